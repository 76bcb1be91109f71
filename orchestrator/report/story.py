"""The attempts of a build, collected from its events."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.events import Event, NodesProbed, Planned, StepEvent, StepFailed, StepStarted, StepSucceeded, kind_of
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.steps import FailureKind

State = Literal["running", "succeeded", "failed", "moved"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a step on a node. Times are seconds since 1970."""

    step: str
    node: str
    number: int
    began: float
    ended: float
    state: State
    message: str = ""
    """Reason why the attempt failed or moved."""

    @property
    def kind(self) -> str:
        return kind_of(self.step)


class Story:
    """Collects events in order."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.last = 0.0
        """Time of the last event."""
        self.nodes: tuple[NodeFacts, ...] = ()
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._ended: list[Attempt] = []
        self._running: dict[str, Attempt] = {}

    def tell(self, event: Event) -> None:
        """Take in an event."""
        self.began = event.time if self.began is None else self.began
        self.last = max(self.last, event.time)
        if isinstance(event, Planned):
            self.warnings.extend(event.warnings)
            self.notes.extend(event.notes)
        elif isinstance(event, NodesProbed):
            self.nodes = event.nodes
            self.warnings.extend(event.warnings)
        elif isinstance(event, StepStarted):
            self._end(event, "failed", "it did not report again")
            self._running[event.step] = Attempt(event.step, event.node, event.attempt, event.time, event.time, "running")
        elif isinstance(event, StepSucceeded):
            self._end(event, "succeeded")
        elif isinstance(event, StepFailed):
            moved = event.failure.kind is FailureKind.HANDED_OVER
            self._end(event, "moved" if moved else "failed", event.failure.message)

    def attempts(self) -> list[Attempt]:
        """Return the attempts in order of their start; a running attempt ends with the last event."""
        running = [replace(attempt, ended=self.last) for attempt in self._running.values()]
        return sorted([*self._ended, *running], key=lambda attempt: (attempt.began, attempt.step))

    def _end(self, event: StepEvent, state: State, message: str = "") -> None:
        attempt = self._running.pop(event.step, None)
        if attempt is not None:
            self._ended.append(replace(attempt, ended=event.time, state=state, message=message))
