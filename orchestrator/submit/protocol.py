"""Builds that run elsewhere: how they are followed, and the effect of a second submission."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from orchestrator.base.errors import UnreachableError
from orchestrator.events import Event, Published


@dataclass(frozen=True, slots=True)
class Notice:
    """Report that the driver cannot make: the state of its place, and why its pods do not run."""

    kind: Literal["state", "trouble"]
    text: str
    """Text for people."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Facts for machines."""


class Followed(Protocol):
    """A build that can be followed. Following has no effect on the build."""

    def events(self) -> Iterator[Event | Notice]:
        """Yield events from the build's beginning to its end, as they arrive. Raises the reason why it cannot be followed."""
        ...

    def result(self) -> Published:
        """Wait for the end and return the result. Raises the build's own error, CancelledError when it was stopped,
        DriverLostError; also as `events`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Existing:
    """The existing submission under a build's name."""

    failed: bool
    """True: it failed or was stopped."""
    other_build: bool = False
    other_place: bool = False
    """True: its driver waits for another place than requested now."""
    being_deleted: bool = False


def decide(existing: Existing | None) -> Literal["submit", "attach", "replace", "wait", "refuse"]:
    """Decide about a submission: a running, waiting or successful build is attached to, a failed one is replaced.

    "wait": until a deletion is finished. "refuse": the name is another build's.
    """
    if existing is None:
        return "submit"
    if existing.other_build:
        return "refuse"
    if existing.being_deleted:
        return "wait"
    return "replace" if existing.failed or existing.other_place else "attach"


@dataclass(frozen=True, slots=True)
class Clock:
    """Clock that tests replace."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Patience:
    """Tolerates failing requests for a while: the build continues meanwhile."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self._since: float | None = None

    def answered(self) -> None:
        """Record an answer."""
        self._since = None

    def failed(self, error: UnreachableError) -> None:
        """Record a failure. Raises UnreachableError after too long without an answer."""
        now = self._clock.now()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._seconds:
            raise UnreachableError(f"{error.message}, for {self._seconds:g} s", "The build may still run: try again.") from None
