"""Estimate the remaining time of a build: the plan's estimates, corrected by the duration of its ended steps."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.events import kind_of


class Remaining:
    """Knows steps by name and takes the time from events, so that a replayed build gives the same estimates."""

    def __init__(self) -> None:
        self._guesses: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._started_at: float | None = None

    def plan(self, guesses: Mapping[str, float]) -> None:
        """Set the estimated seconds of every step to run, on one slot."""
        self._guesses = dict(guesses)

    def start(self, step: str, at: float) -> None:
        self._began[step] = at
        self._started_at = at if self._started_at is None else self._started_at

    def end(self, step: str, at: float) -> None:
        """Note that a step has succeeded."""
        self._took[step] = max(at - self._began.pop(step, at), 1e-3)

    def drop(self, step: str) -> None:
        """Note that an attempt has failed; the next one starts over."""
        self._began.pop(step, None)

    def seconds(self, at: float, parts: Mapping[str, float]) -> float | None:
        """Return the seconds from `at` to the end; None until a step has ended. `parts`: finished part of running steps, 0 to 1."""
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
        """Return measured seconds per estimated second: of this kind if a step of it has ended, else of all kinds."""
        own = [step for step in self._took if step.startswith(kind + "/") or step == kind]
        known = [step for step in own or self._took if self._guesses.get(step)]
        guessed = sum(self._guesses[step] for step in known)
        return sum(self._took[step] for step in known) / guessed if guessed else 1.0
