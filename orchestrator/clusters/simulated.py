"""A cluster that runs nothing: steps take their estimated seconds on a clock that jumps, failures follow a script.

The real schedule and the real driver run against it, so what it shows of order, retries and makespan is what they do.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from orchestrator.clusters import AnyEvent
from orchestrator.clusters.admission import Admission
from orchestrator.core.progress import StepFailed, StepStarted, StepSucceeded
from orchestrator.core.spec import ClusterSpec
from orchestrator.core.step import Failure, Outcome, Task

NODE = "simulated"


class SimulatedCluster:
    """`failures` maps (step name, attempt) to the failure that this attempt ends with."""

    def __init__(self, spec: ClusterSpec, failures: Mapping[tuple[str, int], Failure] | None = None) -> None:
        self._admission = Admission(spec)
        self._failures = dict(failures or {})
        self._ending: list[tuple[float, int, Task]] = []
        self._events: list[AnyEvent] = []
        self._clock = 0.0
        self._sequence = 0
        self.history: list[tuple[float, float, str]] = []
        """(start, end, step name) of every attempt, in order of its end."""

    def start(self, task: Task) -> None:
        self._admission.add(task)
        self._begin()

    def events(self, timeout_seconds: float | None) -> list[AnyEvent]:
        if not self._events:
            self._advance(timeout_seconds)
        found, self._events = self._events, []
        return found

    def now(self) -> float:
        return self._clock

    def close(self) -> None:
        self._admission.clear()
        self._ending.clear()

    def _begin(self) -> None:
        for placed in self._admission.begin():
            task = placed.task
            self._sequence += 1
            heapq.heappush(self._ending, (self._clock + task.step.estimate.seconds, self._sequence, task))
            self._events.append(StepStarted(digest=task.step.digest, node=NODE, attempt=task.attempt))

    def _advance(self, timeout_seconds: float | None) -> None:
        limit = float("inf") if timeout_seconds is None else self._clock + timeout_seconds
        if not self._ending or self._ending[0][0] > limit:
            self._clock = limit if limit != float("inf") else self._clock
            return
        self._clock, _, task = heapq.heappop(self._ending)
        step = task.step
        self.history.append((self._clock - step.estimate.seconds, self._clock, step.name))
        self._admission.end(step.digest)
        failure = self._failures.get((step.name, task.attempt))
        if failure is not None:
            self._events.append(StepFailed(digest=step.digest, failure=failure))
        else:
            outcome = Outcome(
                digest=step.digest, name=step.name, kind=step.kind, outputs=(), node=NODE, seconds=step.estimate.seconds
            )
            self._events.append(StepSucceeded(digest=step.digest, outcome=outcome))
        self._begin()
