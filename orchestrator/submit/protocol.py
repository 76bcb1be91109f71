"""A build handed over, wherever it runs: what can be asked of it, and what a second submission does about a first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from orchestrator.base.errors import UnreachableError
from orchestrator.events.builds import BuildEvent, Published


@dataclass(frozen=True, slots=True)
class Notice:
    """What its driver cannot report: the state of the place that runs it, and why its pods do not run."""

    kind: Literal["state", "trouble"]
    text: str
    """For people."""
    fields: dict[str, Any] = field(default_factory=dict)
    """For machines."""


class Followed(Protocol):
    """A build that can be looked at. Following it has no effect on it."""

    def events(self) -> Iterator[BuildEvent | Notice]:
        """Events from the build's beginning to its end, as they come. Raises what keeps it from being followed."""
        ...

    def result(self) -> Published:
        """Wait for the end. Raises the build's own error, CancelledError when it was stopped, DriverLostError; as `events`."""
        ...


class Submission(Followed, Protocol):
    """A build that was handed over. It runs whether or not anyone follows it."""

    @property
    def id(self) -> str: ...

    @property
    def attached(self) -> bool:
        """Whether it was there before it was submitted."""
        ...

    def cancel(self) -> object:
        """End it and wait until it has ended; what is committed stays. Returns the state that it is, or was, in."""
        ...


@dataclass(frozen=True, slots=True)
class Existing:
    """What a place has under the name of a build that is submitted now."""

    failed: bool
    """It has failed, or was stopped."""
    other_build: bool = False
    other_place: bool = False
    """Its driver waits for another place than is asked for now."""
    being_deleted: bool = False


def decide(existing: Existing | None) -> Literal["submit", "attach", "replace", "wait", "refuse"]:
    """What a submission does: one that runs, waits or has succeeded is joined, one that failed is replaced.

    "wait": until what is being deleted is gone. "refuse": the name is another build's.
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
    """Time, for tests to replace."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Patience:
    """Lets requests fail for a while: the build runs on meanwhile."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self._since: float | None = None

    def answered(self) -> None:
        """Record that the place answers."""
        self._since = None

    def failed(self, error: UnreachableError) -> None:
        """Record a failure. Raises UnreachableError when there was no answer for too long."""
        now = self._clock.now()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._seconds:
            raise UnreachableError(f"{error.message}, for {self._seconds:g} s", "The build may run on: try again.") from None
