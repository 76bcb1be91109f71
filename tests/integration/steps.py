"""Run the steps of a plan one after another in this process: the real functions, without a cluster's start-up time."""

from __future__ import annotations

from collections.abc import Collection

from orchestrator import work
from orchestrator.core.plan import Plan
from orchestrator.core.step import Kind, Outcome, Task


def run_steps(plan: Plan, store: str, kinds: Collection[Kind] = tuple(Kind)) -> dict[str, Outcome]:
    """Outcome by step name of every step of the given kinds."""
    by_digest: dict[str, Outcome] = {}
    for step in plan.steps:
        if step.kind in kinds:
            inputs = {need: by_digest[need] for need in step.needs}
            by_digest[step.digest] = work.run(Task(step=step, inputs=inputs, attempt=1, store=store), lambda event: None)
    return {outcome.name: outcome for outcome in by_digest.values()}


WITHOUT_ENGINES = (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY)
