"""What a node really has, as it says itself before the first step."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.planning.steps import Kind, Step


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
    store_error: str = ""
    """Why a tiny object could not be written, read and removed; empty: it could."""
    store_seconds: float = 0.0
    paths: dict[str, bool] = Field(default_factory=dict)
    """Folders and files that steps read, and whether this node sees them."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of Python and of packages; one that is not installed is absent."""
    error: str = ""
    """Why the node gave no answer."""


def unfit(node: NodeFacts, step: Step) -> str:
    """Why a step must not run on a node that answered so; empty: it may."""
    if node.error or node.store_error:
        return node.error or node.store_error
    unseen = [place for place in step.locations.values() if not node.paths.get(place, True)]
    if unseen:
        return f"{unseen[0]} is missing"
    if step.kind is Kind.BUILD:
        backend = step.options.get("engine", {}).get("backend", "")
        wanted = step.options.get("tensorrt_version")
        if wanted and node.versions.get(backend) != wanted:
            return f"{backend} {node.versions.get(backend, 'is not installed')}, not {wanted}"
    if step.resources.gpus > len(node.devices):
        return "no driver finds the GPU"
    return ""
