"""What a node really has, as it says itself before the first step."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class GpuFacts(BaseModel):
    """A device, as its driver describes it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    memory_bytes: int
    compute_capability: str = ""
    """E.g. 9.0."""


class NodeFacts(BaseModel):
    """One node's answer; what it could not find out stays empty."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    node: str
    """As outcomes name it."""
    node_id: str = ""
    address: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    cpus: float = 0
    """That it offers to steps."""
    gpus: float = 0
    memory_bytes: int = 0
    devices: tuple[GpuFacts, ...] = ()
    driver: str = ""
    """Version of the GPU driver."""
    scratch: str = ""
    """Folder."""
    scratch_free_bytes: int = 0
    shm_free_bytes: int = 0
    store_error: str = ""
    """Why a tiny object could not be written, read and removed; empty: it could."""
    store_seconds: float = 0.0
    places: dict[str, bool] = Field(default_factory=dict)
    """Folders and files that steps read, and whether this node sees them."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of Python and of packages; one that is not installed is absent."""
    mpiexec: bool = False
    error: str = ""
    """Why the node gave no answer."""
