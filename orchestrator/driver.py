"""The loop: schedule -> commands -> cluster -> events -> schedule. No step's bytes pass through here."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.clusters import AnyEvent, Cluster
from orchestrator.core.errors import StepFailedError
from orchestrator.core.plan import Plan
from orchestrator.core.schedule import Schedule, Start
from orchestrator.core.spec import ClusterSpec
from orchestrator.core.step import Failure, Outcome, Task
from orchestrator.report import Listener


@dataclass(frozen=True, slots=True)
class Result:
    """How a plan ended."""

    outcomes: Mapping[str, Outcome]
    """By digest: committed before or now."""
    ran: frozenset[str]
    """Digests that ran in this build."""
    failures: Mapping[str, Failure] = field(default_factory=dict)

    def raise_failures(self, plan: Plan) -> None:
        """Raise the first failure as the error that it was; others are counted in the message."""
        if not self.failures:
            return
        digest, failure = next(iter(self.failures.items()))
        error = failure.to_error(plan.step(digest).name)
        if len(self.failures) > 1:
            others = ", ".join(plan.step(other).name for other in list(self.failures)[1:])
            raise type(error)(f"{error.message} (also failed: {others})", error.advice) from None
        raise error


def drive(plan: Plan, committed: Mapping[str, Outcome], cluster: Cluster, spec: ClusterSpec, listener: Listener) -> Result:
    """Run what is pending until everything is committed or a step has failed for good."""
    schedule = Schedule(plan, committed, spec.retries)
    delayed: list[tuple[float, int, Start]] = []
    ran: set[str] = set()
    counter = 0

    def launch(commands: list[Start]) -> None:
        nonlocal counter
        for command in commands:
            counter += 1
            heapq.heappush(delayed, (cluster.now() + command.delay_seconds, counter, command))
            if command.attempt > 1:
                listener.on_retry(command)
        while delayed and delayed[0][0] <= cluster.now():
            due = heapq.heappop(delayed)[2]
            if schedule.begin(due):
                _start(due, schedule, cluster, spec)

    launch(schedule.start())
    while not schedule.done:
        wait = max(delayed[0][0] - cluster.now(), 0.0) if delayed else None
        events: list[AnyEvent] = cluster.events(wait)
        commands: list[Start] = []
        for event in events:
            listener.on_event(event)
            if event.type == "succeeded":
                ran.add(event.digest)
            commands.extend(schedule.handle(event))
        launch(commands)
        if schedule.num_running == 0 and not delayed and not schedule.done:
            raise StepFailedError("the plan cannot go on: nothing runs and something is pending", "This is a bug: report it.")
    return Result(schedule.outcomes, frozenset(ran), schedule.failures)


def _start(command: Start, schedule: Schedule, cluster: Cluster, spec: ClusterSpec) -> None:
    step = command.step
    cluster.start(
        Task(
            step=step,
            inputs={need: schedule.outcomes[need] for need in step.needs},
            attempt=command.attempt,
            store=spec.store,
            store_options=spec.store_options,
            scratch=spec.scratch,
        )
    )
