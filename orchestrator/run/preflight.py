"""Checks before the first step: pools, memory, disks, tools.

Only what depends on the place: source and topology are checked when the plan is made.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.base.errors import ClusterError, StoreFullError
from orchestrator.base.extras import require
from orchestrator.model.compute_capability import check_target
from orchestrator.planning.plan import Plan, unplaceable
from orchestrator.planning.steps import Kind, Outcome, Step
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stores.store import Store

_EXTRAS = {"local": ("build",), "mpi": ("build", "mpi"), "ray": ("build", "ray")}


def check_extras(cluster_spec: ClusterSpec) -> None:
    """Check that the driver has what steps of this place need, before anything is done. Raises ToolError."""
    require(*_EXTRAS[cluster_spec.kind])


def check_build(plan: Plan, committed: Mapping[str, Outcome], cluster_spec: ClusterSpec, store: Store) -> tuple[str, ...]:
    """Check a plan against the place where it will run; returns warnings.

    Raises ArchitectureError, QuantizationError for GPUs that lack a number format, ClusterError, ToolError, StoreError.
    """
    from orchestrator.networks import check_supported

    check_supported(plan.inputs.config)
    check_target(plan.inputs.model_quantization, plan.spec.engine.compute_capabilities)
    warnings = check_steps(plan, committed, cluster_spec, store)
    pending = plan.pending(committed)
    if cluster_spec.kind == "local":
        _check_tools(plan, {step.kind for step in pending})
        _check_scratch(pending, cluster_spec, store)
    return warnings


def check_steps(plan: Plan, committed: Mapping[str, Outcome], cluster_spec: ClusterSpec, store: Store) -> tuple[str, ...]:
    """Check that every step finds a pool and that the store has room; returns warnings. Raises ClusterError, StoreError."""
    problems = unplaceable(plan, cluster_spec)
    if problems:
        raise ClusterError(
            "the cluster cannot run this plan: " + "; ".join(problems), "Add a pool for these steps to the cluster file."
        )
    pending = plan.pending(committed)
    folder = store.local_path("probe")
    if folder is not None:
        needed = sum(step.estimate.write_bytes for step in pending)
        _check_room(folder, needed, store.url, "the steps write", "Free space, or choose another place to write to.")
    return memory_warnings(pending, cluster_spec)


def memory_warnings(steps: Sequence[Step], cluster_spec: ClusterSpec) -> tuple[str, ...]:
    """Return a warning when steps need more memory than this machine has; such a step runs alone.

    Only pools without a `memory` setting: exceeding that setting is an error of `unplaceable`.
    """
    from orchestrator.run.admission import machine_memory_bytes

    if cluster_spec.kind != "local":
        return ()
    present = machine_memory_bytes()
    unbounded = [step for step in steps if (pool := cluster_spec.pool_for(step.kind.value)) is not None and pool.memory is None]
    large = sorted(
        (step for step in unbounded if step.resources.memory_bytes > present), key=lambda step: -step.resources.memory_bytes
    )
    if not large:
        return ()
    return (
        f"{len(large)} steps need more memory than this machine's {present:,} bytes, {large[0].name} about "
        f"{large[0].resources.memory_bytes:,}: each runs alone and may be killed. More tp or pp makes ranks smaller",
    )


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
    if step.kind in (Kind.BUILD, Kind.VERIFY) and store.local_path("probe") is None:
        return step.estimate.read_bytes
    return 0


def _check_room(path: Path, needed: int, where: str, what: str, advice: str) -> None:
    free = shutil.disk_usage(next(parent for parent in path.resolve().parents if parent.exists())).free
    if needed > free:
        raise StoreFullError(f"{where} has {free:,} bytes free, {what} about {needed:,}", advice)
