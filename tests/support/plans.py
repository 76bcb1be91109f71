"""Plans of fake steps: only the graph, the estimates and the names matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Estimate, Failure, FailureKind, Kind, Outcome, Resources, Step, Task


def fake_plan(needs: Mapping[str, Sequence[str]], seconds: Mapping[str, float] | None = None, memory_bytes: int = 0) -> Plan:
    """Steps by name, each with the names of its needs; a need stands before what needs it."""
    made: dict[str, Step] = {}
    for name, wanted in needs.items():
        made[name] = Step(
            kind=Kind.CONVERT,
            version=1,
            name=name,
            options={"name": name},
            needs=tuple(made[need].digest for need in wanted),
            resources=Resources(memory_bytes=memory_bytes),
            estimate=Estimate(seconds=(seconds or {}).get(name, 1.0)),
        )
    nothing: Any = None  # schedule and driver look at the steps alone
    return Plan(nothing, nothing, tuple(made.values()))


def task(
    name: str,
    kind: Kind = Kind.CONVERT,
    locations: Mapping[str, str] | None = None,
    *,
    seconds: float = 1.0,
    attempt: int = 1,
    **resources: int,
) -> Task:
    """Of a step that needs nothing."""
    step = Step(
        kind=kind,
        version=1,
        name=name,
        options={"name": name},
        locations=dict(locations or {}),
        resources=Resources(**resources),
        estimate=Estimate(seconds=seconds),
    )
    return Task(step=step, inputs={}, attempt=attempt, store="memory://none")


def named(plan: Plan, name: str) -> Step:
    return next(step for step in plan.steps if step.name == name)


def outcome_of(step: Step) -> Outcome:
    return Outcome(digest=step.digest, name=step.name, kind=step.kind, outputs=())


LOST = Failure(kind=FailureKind.INFRASTRUCTURE, message="node lost")
WRONG = Failure(kind=FailureKind.APPLICATION, message="weights are wrong", error="DtypeError", advice="mend them")
