"""Facts of a node, reported by the node before the first step."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.engines import collectives_problem
from orchestrator.planning.steps import Kind, Step


class GpuFacts(BaseModel):
    """A GPU as its driver describes it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    memory_bytes: int
    compute_capability: str = ""
    """Compute capability, e.g. 9.0."""


class NodeFacts(BaseModel):
    """Report of one node. Facts that it could not find out stay empty."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    node: str
    """Name of the node, as in outcomes."""
    node_id: str = ""
    address: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    cpus: float = 0
    """CPU slots for steps."""
    gpus: float = 0
    memory_bytes: int = 0
    devices: tuple[GpuFacts, ...] = ()
    driver: str = ""
    """Version of the GPU driver."""
    scratch: str = ""
    """Scratch folder."""
    scratch_free_bytes: int = 0
    store_error: str = ""
    """Error when writing, reading and removing a tiny object; empty: no error."""
    store_seconds: float = 0.0
    paths: dict[str, bool] = Field(default_factory=dict)
    """Whether this node sees a folder or file that steps read, by path."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and of packages; absent if not installed."""
    error: str = ""
    """Reason for a missing report."""


def unfit(node: NodeFacts, step: Step) -> str:
    """Return why a step must not run on a node with these facts; empty: it may."""
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
        tp = step.options.get("network", {}).get("stage", {}).get("tp", 1)
        problem = collectives_problem(backend, node.versions.get(backend), tp)
        if problem:
            return problem
    if step.resources.gpus > len(node.devices):
        return "no driver finds the GPU"
    return ""
