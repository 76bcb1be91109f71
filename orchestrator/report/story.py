"""What happened in a build, attempt by attempt, put together from its events."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.events.builds import BuildEvent, NodesSeen, Planned, Stepped
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
    """Why it failed or moved."""

    @property
    def kind(self) -> str:
        return self.step.partition("/")[0]


class Story:
    """Takes events in order."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.last = 0.0
        """Time of the last event."""
        self.nodes: tuple[NodeFacts, ...] = ()
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._ended: list[Attempt] = []
        self._running: dict[str, Attempt] = {}

    def tell(self, event: BuildEvent) -> None:
        """Take an event."""
        self.began = event.at if self.began is None else self.began
        self.last = max(self.last, event.at)
        if isinstance(event, Planned):
            self.warnings.extend(event.warnings)
            self.notes.extend(event.notes)
        elif isinstance(event, NodesSeen):
            self.nodes = event.nodes
            self.warnings.extend(event.warnings)
        elif isinstance(event, Stepped):
            self._stepped(event)

    def attempts(self) -> list[Attempt]:
        """In order of their beginning; one that runs still ends with the last event."""
        running = [replace(attempt, ended=self.last) for attempt in self._running.values()]
        return sorted([*self._ended, *running], key=lambda attempt: (attempt.began, attempt.step))

    def _stepped(self, told: Stepped) -> None:
        event = told.event
        if event.type == "started":
            self._end(told.step, told.at, "failed", "nothing more was heard of it")
            self._running[told.step] = Attempt(told.step, event.node, event.attempt, told.at, told.at, "running")
        elif event.type == "succeeded":
            self._end(told.step, told.at, "succeeded")
        elif event.type == "failed":
            moved = event.failure.kind is FailureKind.HANDED_OVER
            self._end(told.step, told.at, "moved" if moved else "failed", event.failure.message)

    def _end(self, step: str, at: float, state: State, message: str = "") -> None:
        attempt = self._running.pop(step, None)
        if attempt is not None:
            self._ended.append(replace(attempt, ended=at, state=state, message=message))
