"""The choice of the next tokens from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import SpecError

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Divisor of the logits; 0: always the most probable token."""
    top_p: float = 1.0
    """Probability of the smallest set of most probable tokens that one is drawn from."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < np.inf and 0 < self.top_p <= 1):
            raise SpecError(
                f"temperature {self.temperature:g} and top_p {self.top_p:g} choose no token",
                "Give a temperature of 0 or more, and top_p above 0, at most 1.",
            )


class Sampler:
    """Chooses tokens, the same ones for the same seed."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._generator = sampling, np.random.default_rng(sampling.seed)

    def next_tokens(self, logits: Floats) -> npt.NDArray[np.int64]:
        """Return the token ids [B] for logits [B, vocabulary]."""
        if not self._sampling.temperature:
            return np.asarray(logits.argmax(axis=-1), np.int64)
        return np.array([self._draw(row) for row in logits], np.int64)

    def _draw(self, logits: Floats) -> int:
        scaled = logits.astype(np.float64) / self._sampling.temperature
        order = np.argsort(-scaled, kind="stable")
        probabilities = np.exp(scaled[order] - scaled[order[0]])
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        kept = probabilities * (before < self._sampling.top_p)
        return int(order[self._generator.choice(len(order), p=kept / kept.sum())])
