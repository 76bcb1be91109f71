"""Checks before the first step: pools, memory, disks, tools.

Only what depends on the place: source and topology are checked when the plan is made.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.base.errors import ClusterError, StoreFullError
from orchestrator.base.extras import require
from orchestrator.model.compute_capability import check_target
from orchestrator.planning.places import unplaceable
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Step
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.stores.store import Store

_EXTRAS = {"local": ("build",), "mpi": ("build", "mpi"), "ray": ("build", "ray")}


def check_extras(cluster_spec: ClusterSpec) -> None:
    """Check that the driver has what steps of this place need, before anything is done. Raises ToolError."""
    require(*_EXTRAS[cluster_spec.kind])


def check_build(plan: Plan, pending: Sequence[Step], cluster_spec: ClusterSpec, store: Store) -> None:
    """Check a plan against the place where it will run.

    Raises ArchitectureError, QuantizationError for GPUs that lack a number format, ClusterError, ToolError, StoreError.
    """
    from orchestrator.networks import check_supported

    check_supported(plan.inputs.config)
    check_target(plan.inputs.model_quantization, plan.spec.engine.compute_capabilities)
    _check_collectives(plan, pending)
    check_steps(plan, pending, cluster_spec, store)
    if cluster_spec.kind == "local":
        _check_tools(plan, {step.kind for step in pending})
        _check_scratch(pending, cluster_spec, store)


def check_steps(plan: Plan, pending: Sequence[Step], cluster_spec: ClusterSpec, store: Store) -> None:
    """Check that every step finds a pool and memory, and that the store has room. Raises ClusterError, StoreError."""
    problems = unplaceable(plan, cluster_spec)
    if problems:
        raise ClusterError(
            "the cluster cannot run this plan: " + "; ".join(problems), "Add a pool for these steps to the cluster file."
        )
    folder = store.local_path("probe")
    if folder is not None:
        needed = sum(step.estimate.write_bytes for step in pending)
        _check_room(folder, needed, store.url, "the steps write", "Free space, or choose another place to write to.")
    if cluster_spec.kind == "local":
        from orchestrator.scheduling.cluster import machine_memory_bytes

        for kind in Kind:
            steps = [step for step in pending if step.kind is kind]
            check_memory(steps, cluster_spec.pool_for(kind.value), machine_memory_bytes(), "this machine")


def check_memory(steps: Sequence[Step], pool: PoolSpec | None, present_bytes: int, where: str) -> None:
    """Refuse steps that need more memory than `where` has, e.g. "this machine".

    A pool with a `memory` setting is not checked here: exceeding that setting is an error of `unplaceable`. Raises ClusterError.
    """
    if pool is None or pool.memory is not None:
        return
    large = [step for step in steps if step.resources.memory_bytes > present_bytes]
    large.sort(key=lambda step: -step.resources.memory_bytes)
    if not large:
        return
    others = f", and {len(large) - 1} more steps need more than it has" if len(large) > 1 else ""
    raise ClusterError(
        f"{large[0].name} needs about {large[0].resources.memory_bytes:,} bytes of memory, {where} has {present_bytes:,}{others}",
        f"{_HELP[large[0].kind]} Larger nodes help too: give them a pool with `steps: [{large[0].kind.value}]`. To try it all the "
        "same, set `memory` of the pool in the cluster file.",
    )


_SMALLER_RANKS = "More tp or pp makes ranks smaller."
_HELP = {
    Kind.MINIATURE: "It needs the memory of torch and transformers.",
    Kind.REFERENCE: "It holds one layer of the model in float32, whatever the topology.",
    Kind.CALIBRATE: "More quantization.calibration.num_stages makes its parts smaller.",
    Kind.CONVERT: "It holds blocks of the largest tensor.",
    Kind.BUILD: _SMALLER_RANKS,
    Kind.VERIFY: _SMALLER_RANKS,
    Kind.EXPORT: _SMALLER_RANKS,
}
"""Advice on the memory of a step, by its kind."""


def _check_collectives(plan: Plan, pending: Sequence[Step]) -> None:
    from orchestrator.engines import require_collectives

    if any(step.kind is Kind.BUILD for step in pending):
        require_collectives(plan.spec.engine.backend, plan.inputs.tensorrt_version, plan.spec.topology.tp)


def _check_tools(plan: Plan, kinds: set[Kind]) -> None:
    from orchestrator.engines import require_version

    if Kind.BUILD in kinds:
        require_version(plan.spec.engine.backend, plan.inputs.tensorrt_version)


def _check_scratch(pending: Sequence[Step], cluster_spec: ClusterSpec, store: Store) -> None:
    """Check the room for the largest copy that one step makes in scratch. Raises StoreError."""
    scratch = Path(cluster_spec.scratch or tempfile.gettempdir())
    copies = {step.name: _scratch_bytes(step, store) for step in pending}
    name = max(copies, key=lambda step: copies[step], default=None)
    if name is not None and copies[name]:
        advice = "Set scratch in the cluster file to a larger folder."
        _check_room(scratch / "step", copies[name], f"scratch ({scratch})", f"{name} copies", advice)


def _scratch_bytes(step: Step, store: Store) -> int:
    """Return the bytes that a step copies to scratch: shards of a remote store."""
    if step.kind in (Kind.BUILD, Kind.VERIFY, Kind.EXPORT) and store.local_path("probe") is None:
        return step.estimate.read_bytes
    return 0


def _check_room(path: Path, needed: int, where: str, what: str, advice: str) -> None:
    free = shutil.disk_usage(next(parent for parent in path.resolve().parents if parent.exists())).free
    if needed > free:
        raise StoreFullError(f"{where} has {free:,} bytes free, {what} about {needed:,}", advice)
