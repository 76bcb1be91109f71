"""How long a build is going to take: the plan's guesses, put right by what its steps have taken so far."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.events import kind_of


class Remaining:
    """Knows steps by name and time by the events' own, so that a replayed build says what it said."""

    def __init__(self) -> None:
        self._guesses: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._started_at: float | None = None

    def plan(self, guesses: Mapping[str, float]) -> None:
        """The seconds that every step to run is guessed to take on one slot."""
        self._guesses = dict(guesses)

    def start(self, step: str, at: float) -> None:
        self._began[step] = at
        self._started_at = at if self._started_at is None else self._started_at

    def end(self, step: str, at: float) -> None:
        """A step has succeeded."""
        self._took[step] = max(at - self._began.pop(step, at), 1e-3)

    def drop(self, step: str) -> None:
        """An attempt has failed; another one begins from nothing."""
        self._began.pop(step, None)

    def seconds(self, at: float, parts: Mapping[str, float]) -> float | None:
        """From `at` to the end; `parts` say how much of a running step is done, 0 to 1. None: nothing has ended yet."""
        if self._started_at is None or not self._took or not self._guesses:
            return None
        rest = [self._rest(step, at, parts.get(step, 0.0)) for step in self._guesses if step not in self._took]
        running = sum(at - began for began in self._began.values())
        width = (sum(self._took.values()) + running) / max(at - self._started_at, 1e-3)
        return max(sum(rest) / max(width, 1.0), max(rest, default=0.0))

    def _rest(self, step: str, at: float, part: float) -> float:
        whole = self._guesses[step] * self._scale(kind_of(step))
        if step not in self._began:
            return whole
        spent = at - self._began[step]
        by_part = spent * (1 - part) / part if part > 0.05 else whole - spent
        return max(by_part, 0.0)

    def _scale(self, kind: str) -> float:
        """Seconds per guessed second: of the kind where one of it has ended, else of all."""
        own = [step for step in self._took if step.startswith(kind + "/") or step == kind]
        known = [step for step in own or self._took if self._guesses.get(step)]
        guessed = sum(self._guesses[step] for step in known)
        return sum(self._took[step] for step in known) / guessed if guessed else 1.0
