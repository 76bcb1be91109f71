"""Texts of random tokens on both sides of every threshold, and across it while decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.work.miniature.scaling import Threshold

LONGEST = 320
"""Longest text in tokens. Larger thresholds are not crossed."""
_SEED = 32


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text of token ids: a prefill, then `decode_steps` tokens one by one."""

    tokens: tuple[int, ...]
    decode_steps: int

    @property
    def prefill(self) -> int:
        return len(self.tokens) - self.decode_steps

    def calls(self) -> list[tuple[int, ...]]:
        """Return the tokens of each call."""
        return [self.tokens[: self.prefill], *((token,) for token in self.tokens[self.prefill :])]

    def crossed(self, thresholds: Iterable[Threshold]) -> list[str]:
        """Return the keys of the thresholds that the text exceeds."""
        return [threshold.key for threshold in thresholds if len(self.tokens) > threshold.tokens]


def prompts(lengths: Iterable[int], vocabulary: int) -> list[Prompt]:
    """Return texts within each length, across it while decoding, and beyond it in prefill; the shortest first."""
    shapes = {(4, 1)}
    for length in lengths:
        shapes |= {(length, 2), (length + 2, 3), (length + 5, 2)}
        shapes |= {(2 * length + 3, 1)} if length < _SEED else set()
    generator = np.random.default_rng(_SEED)
    return [
        Prompt(tuple(int(token) for token in generator.integers(0, vocabulary, total)), steps) for total, steps in sorted(shapes)
    ]


def crossable(thresholds: Sequence[Threshold]) -> list[Threshold]:
    """Return the thresholds that a text of the miniature crosses."""
    return [threshold for threshold in thresholds if threshold.tokens + 5 <= LONGEST]
