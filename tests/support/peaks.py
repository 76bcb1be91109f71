"""The peak of a step's memory, in a process of its own.

    python -m tests.support.peaks < task.json

prints the outcome and the largest resident set of the process (VmHWM, which exec resets; ru_maxrss it does not).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Outcome, Step, Task


@dataclass(frozen=True)
class Measured:
    """A step that ran."""

    step: Step
    outcome: Outcome
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Estimate over peak."""
        return self.step.resources.memory_bytes / self.peak_bytes


def run_apart(step: Step, inputs: Mapping[str, Outcome], store: str, threads: int = 1) -> Measured:
    """Run a step in a new process."""
    task = Task(step=step, inputs={need: inputs[need] for need in step.needs}, attempt=1, store=store)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", "tests.support.peaks"]
    done = subprocess.run(words, input=task.model_dump_json(), stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Measured(step, Outcome.model_validate(found["outcome"]), found["peak_bytes"])


def measure(plan: Plan, store: str, seen: Callable[[Measured], None] = lambda measured: None) -> list[Measured]:
    """Run every step of a plan, one after the other."""
    found: list[Measured] = []
    outcomes: dict[str, Outcome] = {}
    for step in plan.steps:
        found.append(run_apart(step, outcomes, store))
        outcomes[step.digest] = found[-1].outcome
        seen(found[-1])
    return found


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    from orchestrator import work

    outcome = work.run(Task.model_validate_json(sys.stdin.read()), lambda event: None)
    print(json.dumps({"outcome": outcome.model_dump(mode="json"), "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
