"""Run the steps of a plan one after another in this process: the real functions, without a cluster's start-up time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from orchestrator import work
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.scheduling import commits


def run_steps(plan: Plan, store: str, kinds: Collection[Kind] = tuple(Kind)) -> dict[str, Outcome]:
    """Outcome by step name of every step of the given kinds."""
    by_digest: dict[str, Outcome] = {}
    for step in plan.steps:
        if step.kind in kinds:
            inputs = {need: by_digest[need] for need in step.needs}
            by_digest[step.digest] = work.run(Task(step=step, inputs=inputs, attempt=1, store=store), lambda event: None)
    return {outcome.name: outcome for outcome in by_digest.values()}


def forge(store: Path, outcome: Outcome) -> None:
    """Let a committed outcome in the folder `store` vouch for its outputs as they are now: a fault of its step, not of the disk."""
    outputs = tuple(
        output.model_copy(update={"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        for output in outcome.outputs
        for data in [(store / output.key).read_bytes()]
    )
    path = store / commits.outcome_key(outcome.digest)
    path.unlink()
    path.write_text(outcome.model_copy(update={"outputs": outputs}).model_dump_json())


WITHOUT_ENGINES = (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY)
