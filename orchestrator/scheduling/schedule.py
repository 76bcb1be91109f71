"""Schedule of one build: events in, commands out. No clock, no I/O, no threads.

A step starts as soon as its own needs are committed; there is no barrier between stages. After a step fails for good nothing new
starts, and running steps finish, because a committed outcome is never lost. Only a failed miniature ends the build at once: the
model's config is read wrongly, so every other step is wasted.

An outcome is taken back when its stored bytes are wrong, or when it was made from other bytes than its needs hold now. Its step
runs again, then the steps that wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.base.errors import DamagedOutputError
from orchestrator.events import StepEvent, StepFailed, StepSucceeded
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Cause, Failure, FailureKind, Kind, Outcome, Step
from orchestrator.scheduling.consumption import outdated
from orchestrator.scheduling.retry import retry_delay
from orchestrator.spec.cluster import RetrySpec

MAX_REPEATS = 2
"""Times that an outcome of a step is taken back in one build. A store that damages more cannot be trusted."""


@dataclass(frozen=True, slots=True)
class Start:
    """Command to start an attempt of a step after a delay."""

    step: Step
    attempt: int
    delay_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TakenBack:
    """An outcome that no longer counts. The store sets it aside before its step runs again."""

    outcome: Outcome
    reason: str
    damaged: bool
    """True: its stored bytes are wrong. False: it was made from other bytes than its needs hold now."""


def taken_back(outcomes: Mapping[str, Outcome], damage: DamagedOutputError) -> TakenBack:
    """Return the outcome that holds a damaged object. Raises `damage` itself when no outcome does."""
    for outcome in outcomes.values():
        if any(output.key == damage.key for output in outcome.outputs):
            return TakenBack(outcome, damage.message, damaged=True)
    raise damage


class Schedule:
    """State of one build."""

    def __init__(self, plan: Plan, committed: Mapping[str, Outcome], retries: RetrySpec) -> None:
        self.plan = plan
        self._retries = retries
        self._pending = {step.digest: step for step in plan.pending(committed)}
        self._running: dict[str, int] = {}
        """Attempt number of each step that runs or waits for its next attempt, by digest."""
        self._waiting: dict[str, Failure] = {}
        """Failure of the last attempt, by digest of the waiting step."""
        self.outcomes: dict[str, Outcome] = dict(committed)
        self.failures: dict[str, Failure] = {}
        self.lost: dict[str, list[Failure]] = {}
        """Failures of earlier attempts, by digest, including those handed over to another node."""
        self._needed_by: dict[str, list[str]] = {}
        for step in plan.steps:
            for need in step.needs:
                self._needed_by.setdefault(need, []).append(step.digest)
        self._taken_back: list[TakenBack] = []
        self._repeats: dict[str, int] = {}
        """Times that the step's outcome was taken back, by digest."""
        self._attempts: dict[str, int] = {}
        """Last attempt of each step that ended, by digest."""
        self.order = plan.order()
        """Priority among steps that can start, by digest; the smallest goes first."""

    @property
    def done(self) -> bool:
        return not self._running and (bool(self.failures) or not self._pending)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def start(self) -> list[Start]:
        """Return the commands that begin the build."""
        return self._start_ready()

    def begin(self, command: Start) -> bool:
        """Whether the command is still wanted after its delay. False when the build failed meanwhile."""
        self._waiting.pop(command.step.digest, None)
        return self._running.get(command.step.digest) == command.attempt

    def handle(self, event: StepEvent) -> list[Start]:
        """Take in one event, return the commands that follow. Ignores late events of steps that are not running."""
        if event.digest not in self._running:
            return []
        self._waiting.pop(event.digest, None)
        if isinstance(event, StepSucceeded):
            self._attempts[event.digest] = self._running.pop(event.digest)
            self.outcomes[event.digest] = event.outcome
            around = [event.digest, *self._needed_by.get(event.digest, ())]
            for digest, reason in outdated(self.plan, self.outcomes, around).items():
                self._take_back(digest, reason, damaged=False)
            return self._start_ready()
        if isinstance(event, StepFailed):
            return self._failed(event.digest, event.failure)
        return []

    def taken_back(self) -> list[TakenBack]:
        """Return the outcomes taken back since the last call."""
        found, self._taken_back = self._taken_back, []
        return found

    def _failed(self, digest: str, failure: Failure) -> list[Start]:
        step, attempt = self.plan.step(digest), self._running[digest]
        failure = failure.model_copy(update={"attempt": attempt, "rank": step.rank})
        if failure.damaged and not self.failures and self._repeat_maker(failure):
            self.lost.setdefault(digest, []).append(failure)
            self._attempts[digest] = self._running.pop(digest)
            self._pend()
            return self._start_ready()
        earlier = self.lost.setdefault(digest, [])
        counted = 1 + sum(other.kind is not FailureKind.HANDED_OVER and not other.damaged for other in earlier)
        delay = retry_delay(self._retries, failure, counted)
        if delay is not None and not self.failures:
            earlier.append(failure)
            self._running[digest] = attempt + 1
            self._waiting[digest] = failure
            return [Start(step, attempt + 1, delay)]
        if delay is None and failure.kind is FailureKind.INFRASTRUCTURE:
            limit = f"{failure.message} (attempt {counted} of {self._retries.max_attempts})"
            failure = failure.model_copy(update={"message": limit})
        self._give_up(digest, failure)
        for waiting, reason in list(self._waiting.items()):
            self._give_up(waiting, reason)
        if step.kind is Kind.MINIATURE:
            self._running.clear()
        return []

    def _repeat_maker(self, failure: Failure) -> bool:
        """Take back the outcome that holds a damaged object; False when that was done too often.

        Another step may have found the same damage before: then the outcome is already a new one.
        """
        makers = [
            outcome.digest for outcome in self.outcomes.values() if any(output.key == failure.damaged for output in outcome.outputs)
        ]
        return all(self._take_back(maker, failure.message, damaged=True) for maker in makers)

    def _take_back(self, digest: str, reason: str, *, damaged: bool) -> bool:
        """Forget an outcome so that its step runs again. False, with a failure of the step, when that was done too often."""
        outcome, step = self.outcomes.pop(digest), self.plan.step(digest)
        self._taken_back.append(TakenBack(outcome, reason, damaged))
        self._repeats[digest] = self._repeats.get(digest, 0) + 1
        attempt = self._attempts.setdefault(digest, 1)
        failure = Failure(
            kind=FailureKind.APPLICATION, message=reason, error="DamagedOutputError", cause=Cause.STORE, attempt=attempt,
            node=outcome.node, rank=step.rank, damaged=outcome.outputs[0].key if outcome.outputs else digest,
        )  # fmt: skip
        if self._repeats[digest] > MAX_REPEATS:
            again = f"{reason}; the step ran again {MAX_REPEATS} times, and each time it was wrong again"
            self.failures[digest] = failure.model_copy(update={"message": again, "advice": _UNSOUND})
            return False
        self.lost.setdefault(digest, []).append(failure)
        self._pend()
        return True

    def _pend(self) -> None:
        pending = self.plan.pending(self.outcomes)
        self._pending = {step.digest: step for step in pending if step.digest not in self._running}

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
            self._running[step.digest] = self._attempts.get(step.digest, 0) + 1
        return [Start(step, self._running[step.digest]) for step in ready]


_UNSOUND = "The disk, server or network under the store damages what is written to it: mend it, or use another store."
