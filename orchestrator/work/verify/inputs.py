"""The calls of a verification: one right-padded prefill, then decode steps through the cache.

A rank that gathers its experts lists few of them when few tokens pass, and all when many do. So the last step is repeated
for the first sequences alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.model.stage import StageNetwork

Ints = npt.NDArray[np.int64]
Place = tuple[int, int, int, int]
"""Sequence, position, call, row within the call."""
_REPEATED = (1, 2)
"""One token, whose experts differ; two, which may choose one expert twice."""


@dataclass(frozen=True, slots=True)
class Call:
    """One execution of a stage: B sequences, S tokens each."""

    input_ids: Ints
    position_ids: Ints
    write_indices: Ints
    repeats: bool = False
    """Whether the call repeats the step before for the first sequences alone: it reads their caches, and leaves none."""

    @property
    def logit_indices(self) -> Ints:
        """Indices that request the logits of every token, [B, S]."""
        batch, tokens = self.input_ids.shape
        return np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))

    def last_tokens(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the values [B, 1, ...] of every sequence's last token, from [B, S, ...]."""
        rows = self.position_ids.argmax(axis=1)
        return np.ascontiguousarray(values[np.arange(len(rows)), rows][:, None])


def repeated(network: StageNetwork, num_sequences: int) -> tuple[int, ...]:
    """Return for how many of the first sequences, of `num_sequences`, the last step is repeated alone; empty: it is not."""
    return tuple(count for count in _REPEATED if count < num_sequences) if network.experts == "gathered" else ()


def make_calls(tokens: Ints, lengths: Ints, decode_steps: int, repeats: Sequence[int] = ()) -> list[Call]:
    """Split tokens [B, T] into a prefill of at least one token, and a call for each of the last `decode_steps` tokens.

    `repeats`: as `repeated` returns them.
    """
    prefill = np.maximum(lengths - decode_steps, 1)
    width = int(prefill.max())
    positions = np.tile(np.arange(width, dtype=np.int64), (len(lengths), 1))
    inputs = np.where(positions < prefill[:, None], tokens[:, :width], 0)
    calls = [Call(inputs, np.where(positions < prefill[:, None], positions, 0), np.zeros(len(lengths), np.int64))]
    for step in range(decode_steps):
        position = np.minimum(prefill + step, lengths - 1)
        calls.append(Call(np.take_along_axis(tokens, position[:, None], 1), position[:, None], position))
    last = calls[-1]
    alone = (Call(last.input_ids[:n], last.position_ids[:n], last.write_indices[:n], repeats=True) for n in repeats)
    return [*calls, *alone]


def positions_of(lengths: Ints, decode_steps: int, repeats: Sequence[int] = ()) -> Iterator[Place]:
    """Yield the place of every position once, then those of the repeated steps."""
    prefill = np.maximum(lengths - decode_steps, 1)
    for sequence, length in enumerate(lengths):
        for position in range(int(length)):
            if position < prefill[sequence]:
                yield sequence, position, 0, position
            else:
                yield sequence, position, int(position - prefill[sequence]) + 1, 0
    for call, count in enumerate(repeats, 1 + decode_steps):
        yield from ((sequence, int(lengths[sequence]) - 1, call, 0) for sequence in range(count))
