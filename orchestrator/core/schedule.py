"""What runs when: events in, commands out. No clock, no I/O, no threads.

A step starts as soon as its own needs are committed; there is no barrier between stages. After a step fails for good
nothing new starts, and what is running is left to finish, because a committed outcome is never lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.core.plan import Plan
from orchestrator.core.progress import StepFailed, StepProgress, StepStarted, StepSucceeded
from orchestrator.core.retry import Retry, decide
from orchestrator.core.spec import RetrySpec
from orchestrator.core.step import Failure, FailureKind, Outcome, Step


@dataclass(frozen=True, slots=True)
class Start:
    """Start an attempt of a step, after a delay."""

    step: Step
    attempt: int
    delay_seconds: float = 0.0


class Schedule:
    """The state of one build."""

    def __init__(self, plan: Plan, committed: Mapping[str, Outcome], retries: RetrySpec) -> None:
        self._plan = plan
        self._retries = retries
        self._pending = {step.digest: step for step in plan.pending(committed)}
        self._running: dict[str, int] = {}
        """Attempt by digest, of steps that run or wait for their next attempt."""
        self._waiting: dict[str, Failure] = {}
        """Why the last attempt of a waiting step failed."""
        self.outcomes: dict[str, Outcome] = dict(committed)
        self.failures: dict[str, Failure] = {}
        self.retried: dict[str, int] = {}
        """Attempts beyond the first, by digest."""
        self.lost: dict[str, list[Failure]] = {}
        """Why earlier attempts came to nothing, by digest; those that were handed over too."""
        self.order = plan.order()
        """What goes first among steps that could start: the smallest, by digest."""

    @property
    def done(self) -> bool:
        return not self._running and (bool(self.failures) or not self._pending)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def start(self) -> list[Start]:
        """The commands that begin the build."""
        return self._start_ready()

    def begin(self, command: Start) -> bool:
        """Whether a command is still wanted when its delay is over; False: the build failed meanwhile."""
        self._waiting.pop(command.step.digest, None)
        return self._running.get(command.step.digest) == command.attempt

    def handle(self, event: StepStarted | StepProgress | StepSucceeded | StepFailed) -> list[Start]:
        """Take in one event. Events of steps that are not running (late ones of a lost worker) change nothing."""
        if event.digest not in self._running:
            return []
        self._waiting.pop(event.digest, None)
        if isinstance(event, StepSucceeded):
            del self._running[event.digest]
            self.outcomes[event.digest] = event.outcome
            return self._start_ready()
        if isinstance(event, StepFailed):
            return self._failed(event.digest, event.failure)
        return []

    def _failed(self, digest: str, failure: Failure) -> list[Start]:
        step, attempt = self._plan.step(digest), self._running[digest]
        failure = failure.model_copy(update={"attempt": attempt, "rank": step.rank})
        earlier = self.lost.setdefault(digest, [])
        counted = 1 + sum(other.kind is not FailureKind.HANDED_OVER for other in earlier)
        decision = decide(self._retries, failure, counted)
        if isinstance(decision, Retry) and not self.failures:
            earlier.append(failure)
            self._running[digest] = attempt + 1
            self._waiting[digest] = failure
            self.retried[digest] = attempt
            return [Start(step, attempt + 1, decision.delay_seconds)]
        self._give_up(digest, failure if isinstance(decision, Retry) else failure.model_copy(update={"message": decision.reason}))
        for waiting, reason in list(self._waiting.items()):
            self._give_up(waiting, reason)
        return []

    def _give_up(self, digest: str, failure: Failure) -> None:
        del self._running[digest]
        self._waiting.pop(digest, None)
        self.failures[digest] = failure

    def _start_ready(self) -> list[Start]:
        if self.failures:
            return []
        ready = [step for step in self._pending.values() if all(need in self.outcomes for need in step.needs)]
        ready.sort(key=lambda step: self.order[step.digest])
        for step in ready:
            del self._pending[step.digest]
            self._running[step.digest] = 1
        return [Start(step, 1) for step in ready]
