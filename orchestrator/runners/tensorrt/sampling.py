"""The choice of the next tokens from logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import SpecError
from orchestrator.runners import Sampling

Floats = npt.NDArray[np.floating[Any]]


class Sampler:
    """Chooses tokens, the same ones for the same seed."""

    def __init__(self, sampling: Sampling) -> None:
        """Raises SpecError for a temperature below 0, and top_p of 0 or above 1."""
        if not (0 <= sampling.temperature < np.inf and 0 < sampling.top_p <= 1):
            raise SpecError(
                f"temperature {sampling.temperature:g} and top_p {sampling.top_p:g} choose no token",
                "Give a temperature of 0 or more, and top_p above 0, at most 1.",
            )
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
