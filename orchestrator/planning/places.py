"""Parts of a plan that depend on the place where it runs: GPUs for steps that may use one, steps that no pool can hold."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Step
from orchestrator.spec.cluster import ClusterSpec, PoolSpec


def with_offered_gpus(plan: Plan, cluster: ClusterSpec) -> Plan:
    """Return the plan with a GPU for every step of `device: auto` whose pool offers GPUs. Digests stay as they are.

    A step without a GPU of its own sees none, so that it takes none from another step.
    """
    return replace(plan, steps=tuple(_offered(step, cluster.pool_for(step.kind.value)) for step in plan.steps))


def _offered(step: Step, pool: PoolSpec | None) -> Step:
    if pool is None or not pool.gpus or step.locations.get("device") != "auto":
        return step
    return step.model_copy(update={"resources": step.resources.model_copy(update={"gpus": 1})})


def unplaceable(plan: Plan, cluster: ClusterSpec) -> list[str]:
    """Return the steps that no pool of `cluster` can ever hold, grouped by reason; empty: all fit."""
    found: dict[str, list[str]] = {}
    for step in plan.steps:
        if reason := _why_unplaceable(step, cluster.pool_for(step.kind.value)):
            found.setdefault(reason, []).append(step.name)
    return [f"{_shortened(names)}: {reason}" for reason, names in found.items()]


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _why_unplaceable(step: Step, pool: PoolSpec | None) -> str:
    if pool is None:
        return f"no pool runs {step.kind.value} steps"
    if pool.gpus < step.resources.gpus:
        return f"needs {step.resources.gpus} GPU, its pool has too few"
    if pool.memory is not None and pool.memory < step.resources.memory_bytes:
        return f"needs about {step.resources.memory_bytes:,} bytes of memory, its pool has {pool.memory:,}"
    return ""
