"""Compare what the nodes reported with the cluster file and the plan.

Errors are raised before any long work and name the nodes. A problem that need not stop the build is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata

from orchestrator.base.errors import ClusterError, OrchestratorError, SourceMissingError, StoreError, ToolError
from orchestrator.base.urls import is_url
from orchestrator.engines import COLLECTIVES_ADVICE, collectives_problem
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Step
from orchestrator.scheduling.placement import is_of
from orchestrator.scheduling.preflight import check_memory
from orchestrator.spec.cluster import ClusterSpec, PoolSpec

_PACKAGES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


def read_locations(pending: Iterable[Step]) -> list[str]:
    """Return the folders and files (no URLs) that pending steps read."""
    named = {place for step in pending for name, place in step.locations.items() if name in ("source", "scales")}
    return sorted(place for place in named if place.startswith("/") and not is_url(place))


def check_nodes(plan: Plan, pending: Iterable[Step], cluster_spec: ClusterSpec, nodes: Sequence[NodeFacts]) -> tuple[str, ...]:
    """Check the reports of a cluster's nodes; returns warnings.

    Raises ClusterError (no node for a pool, no GPU where one is needed), StoreError (no node reaches the store), ToolError (no node
    has the packages of a step), SourceMissingError (no node sees the checkpoint).
    """
    answered = [node for node in nodes if not node.error]
    warnings = [f"{node.node} did not answer: {node.error}" for node in nodes if node.error]
    if not answered:
        said = "; ".join(warnings) or "it has no nodes"
        raise ClusterError(f"no node of the cluster answers: {said}", "See that the same package is installed on every node.")
    by_kind: dict[Kind, list[Step]] = {}
    for step in pending:
        by_kind.setdefault(step.kind, []).append(step)
    for kind, steps in by_kind.items():
        pool = cluster_spec.pool_for(kind.value)
        if pool is not None:
            warnings.extend(_check_pool(plan, steps, pool, answered))
    return (*dict.fromkeys(warnings), *_versions(answered))


def _check_pool(plan: Plan, steps: list[Step], pool: PoolSpec, nodes: list[NodeFacts]) -> Iterator[str]:
    """Check the nodes of a pool against its steps of one kind; yields warnings."""
    kind = steps[0].kind.value
    mine = [node for node in nodes if is_of(pool, node.labels) and node.cpus >= 1]
    if not mine:
        have = "; ".join(f"{node.node} {_own(node.labels)} with {node.cpus:.0f} CPUs" for node in nodes)
        raise ClusterError(
            f"no node for {kind} steps: none with CPUs carries the labels {dict(pool.labels)}; the nodes: {have}",
            "Correct the pool's labels in the cluster file, or start nodes with them.",
        )
    yield from _usable(mine, lambda node: node.store_error, StoreError, f"reach the store for {kind} steps", "")
    yield from _check_gpus(steps, mine)
    yield from _check_tools(plan, steps[0].kind, mine)
    advice = "Put it at the same path on every node, or into object storage."
    yield from _usable(mine, lambda node: unseen(node, steps), SourceMissingError, f"see the files of {kind} steps", advice)
    largest = max(mine, key=lambda node: node.memory_bytes)
    if largest.memory_bytes:
        check_memory(steps, pool, largest.memory_bytes, f"the largest node for {kind} steps ({largest.node})")


def unseen(node: NodeFacts, steps: Iterable[Step]) -> str:
    """Return the first location that one of `steps` reads and the node does not see; empty: it sees all."""
    places = (place for step in steps for place in step.locations.values())
    return next((f"{place} is missing" for place in places if not node.paths.get(place, True)), "")


def _check_gpus(steps: list[Step], nodes: list[NodeFacts]) -> Iterator[str]:
    gpus = max(step.resources.gpus for step in steps)
    if not gpus:
        return
    names = ", ".join(node.node for node in nodes)
    if max(node.gpus for node in nodes) < gpus:
        raise ClusterError(
            f"{steps[0].name} needs {gpus} GPU: none of {names} offers one", "Add nodes with GPUs, or correct the labels."
        )
    pretended = [node.node for node in nodes if node.gpus >= gpus and len(node.devices) < gpus]
    if len(pretended) == len(nodes):
        raise ClusterError(
            f"no driver finds a GPU on {names}, although the cluster offers some", "Run `nvidia-smi` on these nodes."
        )
    if pretended:
        yield f"{', '.join(pretended)}: offers GPUs that its driver does not find"
    kinds = {(device.name, device.compute_capability) for node in nodes for device in node.devices}
    if len(kinds) > 1:
        listed = ", ".join(sorted(name for name, _ in kinds))
        yield f"{steps[0].kind.value} steps may run on different GPUs ({listed}): an engine runs on the kind that built it"


def _check_tools(plan: Plan, kind: Kind, nodes: list[NodeFacts]) -> Iterator[str]:
    if kind is Kind.BUILD:
        backend, wanted = plan.spec.engine.backend, plan.inputs.tensorrt_version
        tp = plan.spec.topology.tp

        def wrong(node: NodeFacts) -> str:
            found = node.versions.get(backend)
            if found is None:
                return f"{_PACKAGES[backend]} is not installed"
            if wanted and found != wanted:
                return f"{_PACKAGES[backend]} {found}, planned with {wanted}"
            return collectives_problem(backend, found, tp)

        unsound = any(collectives_problem(backend, node.versions.get(backend), tp) for node in nodes)
        advice = COLLECTIVES_ADVICE if unsound else f"Install the same {_PACKAGES[backend]} everywhere."
        yield from _usable(nodes, wrong, ToolError, "run build steps", advice)


def _usable(
    nodes: Sequence[NodeFacts], problem: Callable[[NodeFacts], str], error: type[OrchestratorError], what: str, advice: str
) -> Iterator[str]:
    """Raise `error` when every node has the problem; yield a warning when some have: no steps are placed there."""
    wrong = {node.node: said for node in nodes if (said := problem(node))}
    if not wrong:
        return
    listed = "; ".join(f"{name}: {said}" for name, said in wrong.items())
    if len(wrong) == len(nodes):
        raise error(f"no node can {what}: {listed}", advice)
    yield f"some nodes cannot {what} and are left out: {listed}"


def _own(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name != "ray.io/node-id"}


def _versions(nodes: Iterable[NodeFacts]) -> Iterator[str]:
    """Yield a warning for each package whose version differs between nodes, or from this process."""
    here = _version_here()
    for package in ("trt-orchestrator", "ray", "python"):
        found: dict[str, list[str]] = {}
        for node in nodes:
            found.setdefault(node.versions.get(package, "none"), []).append(node.node)
        if package == "trt-orchestrator" and here:
            found.setdefault(here, []).append("this process")
        if len(found) > 1:
            listed = "; ".join(f"{version} on {', '.join(names)}" for version, names in sorted(found.items()))
            yield f"{package} differs: {listed}"


def _version_here() -> str:
    try:
        return metadata.version("trt-orchestrator")
    except metadata.PackageNotFoundError:
        return ""
