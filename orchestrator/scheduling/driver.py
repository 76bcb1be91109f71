"""The driver loop: schedule -> commands -> cluster -> events -> schedule. No tensor bytes pass through here."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.base.errors import StepFailedError
from orchestrator.events import Listener, StepEvent, StepFailed, StepRetried, StepStarted, StepSucceeded
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Failure, Outcome, Task
from orchestrator.scheduling.cluster import Cluster
from orchestrator.scheduling.schedule import Schedule, Start, TakenBack
from orchestrator.spec.cluster import ClusterSpec


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a plan."""

    outcomes: Mapping[str, Outcome]
    """Outcomes by digest, committed before or in this run."""
    ran: frozenset[str]
    """Digests of the steps that ran in this build."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    lost: Mapping[str, list[Failure]] = field(default_factory=dict)
    """Failures of attempts before the last one, by digest."""

    def raise_failures(self, plan: Plan) -> None:
        """Raise the first failure as its original error. The message names the other failed steps."""
        if not self.failures:
            return
        digest, failure = next(iter(self.failures.items()))
        error = failure.to_error(plan.step(digest).name)
        if len(self.failures) > 1:
            others = ", ".join(plan.step(other).name for other in list(self.failures)[1:])
            raise type(error)(f"{error.message} (also failed: {others})", error.advice) from None
        raise error


def retried(command: Start) -> StepRetried:
    """Return the event of a command that starts another attempt."""
    step = command.step
    return StepRetried(digest=step.digest, step=step.name, attempt=command.attempt, delay_seconds=command.delay_seconds)


Lookup = Callable[[str], Outcome | None]
SetAside = Callable[[TakenBack], object]


def drive(
    plan: Plan,
    committed: Mapping[str, Outcome],
    cluster: Cluster,
    spec: ClusterSpec,
    listener: Listener,
    lookup: Lookup = lambda digest: None,
    build_id: str = "",
    set_aside: SetAside = lambda taken: None,
) -> Result:
    """Run the pending steps until all are committed or one has failed for good.

    `lookup` finds an outcome that was committed meanwhile: a lost worker may have finished before it was missed.
    `build_id` begins the names of this run's attempts. `set_aside` removes the commit of an outcome whose step runs again.
    """
    return _Drive(Schedule(plan, committed, spec.retries), cluster, spec, listener, lookup, build_id, set_aside).run()


@dataclass
class _Drive:
    schedule: Schedule
    cluster: Cluster
    spec: ClusterSpec
    listener: Listener
    lookup: Lookup
    build_id: str
    set_aside: SetAside
    delayed: list[tuple[float, int, Start]] = field(default_factory=list)
    """Heap of commands: due time, sequence number, command."""
    ran: set[str] = field(default_factory=set)
    count: int = 0
    attempts: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Node and number of each step's attempt, by digest."""

    def run(self) -> Result:
        schedule = self.schedule
        self.launch(schedule.start())
        while not schedule.done:
            wait = max(self.delayed[0][0] - self.cluster.now(), 0.0) if self.delayed else None
            commands = [command for event in self.cluster.events(wait) for command in self.take(event)]
            self.launch(commands)
            if schedule.num_running == 0 and not self.delayed and not schedule.done:
                raise StepFailedError("the plan is stuck: steps are pending and none runs", "This is a bug: report it.")
        return Result(schedule.outcomes, frozenset(self.ran), schedule.failures, schedule.lost)

    def take(self, event: StepEvent) -> list[Start]:
        self.listener(self.named(event))
        if isinstance(event, StepSucceeded):
            self.ran.add(event.digest)
        commands = self.schedule.handle(event)
        for taken in self.schedule.taken_back():
            self.set_aside(taken)
        return commands

    def named(self, event: StepEvent) -> StepEvent:
        """Return the event with its step's name, its attempt's node and number, and the driver's own time."""
        if isinstance(event, StepStarted):
            self.attempts[event.digest] = (event.node, event.attempt)
        node, attempt = self.attempts.get(event.digest, ("", 0))
        if isinstance(event, StepSucceeded):
            node = event.outcome.node or node
        elif isinstance(event, StepFailed):
            node = event.failure.node or node
        name = self.schedule.plan.step(event.digest).name
        return event.model_copy(update={"step": name, "node": node, "attempt": attempt, "time": time.time()})

    def launch(self, commands: list[Start]) -> None:
        for command in commands:
            self.count += 1
            heapq.heappush(self.delayed, (self.cluster.now() + command.delay_seconds, self.count, command))
            if command.attempt > 1:
                self.listener(retried(command))
        while self.delayed and self.delayed[0][0] <= self.cluster.now():
            self.begin(heapq.heappop(self.delayed)[2])

    def begin(self, due: Start) -> None:
        if not self.schedule.begin(due):
            return
        step = due.step
        known = self.lookup(step.digest) if due.attempt > 1 else None
        if known is not None:
            self.launch(self.take(StepSucceeded(digest=step.digest, outcome=known)))
            return
        profile = self.spec.profile
        self.cluster.start(
            Task(
                step=step,
                inputs={need: self.schedule.outcomes[need] for need in step.needs},
                attempt=due.attempt,
                order=self.schedule.order[step.digest],
                store=self.spec.store,
                store_options=self.spec.store_options,
                scratch=self.spec.scratch,
                build_id=self.build_id,
                profile=profile.nsys if profile and step.kind.value in profile.steps else None,
                log_format=self.spec.log_format,
            )
        )
