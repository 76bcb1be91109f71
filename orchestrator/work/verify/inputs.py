"""The calls of a verification: one right-padded prefill, then decode steps through the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Call:
    """One execution of a stage: B sequences, S tokens each."""

    input_ids: Ints
    position_ids: Ints
    write_indices: Ints

    @property
    def logit_indices(self) -> Ints:
        """Indices that request the logits of every token, [B, S]."""
        batch, tokens = self.input_ids.shape
        return np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))

    def last_tokens(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the values [B, 1, ...] of every sequence's last token, from [B, S, ...]."""
        rows = self.position_ids.argmax(axis=1)
        return np.ascontiguousarray(values[np.arange(len(rows)), rows][:, None])


def make_calls(tokens: Ints, lengths: Ints, decode_steps: int) -> list[Call]:
    """Split tokens [B, T] into a prefill of at least one token, and a call for each of the last `decode_steps` tokens."""
    prefill = np.maximum(lengths - decode_steps, 1)
    width = int(prefill.max())
    positions = np.tile(np.arange(width, dtype=np.int64), (len(lengths), 1))
    inputs = np.where(positions < prefill[:, None], tokens[:, :width], 0)
    calls = [Call(inputs, np.where(positions < prefill[:, None], positions, 0), np.zeros(len(lengths), np.int64))]
    for step in range(decode_steps):
        position = np.minimum(prefill + step, lengths - 1)
        calls.append(Call(np.take_along_axis(tokens, position[:, None], 1), position[:, None], position))
    return calls


def positions_of(lengths: Ints, decode_steps: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (sequence, position, call, row within the call) of every position once."""
    prefill = np.maximum(lengths - decode_steps, 1)
    for sequence, length in enumerate(lengths):
        for position in range(int(length)):
            if position < prefill[sequence]:
                yield sequence, position, 0, position
            else:
                yield sequence, position, int(position - prefill[sequence]) + 1, 0
