"""Calls of a rank's engine: prompts in chunks of the prefill profile, then single tokens, right-padded as the graph wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.work.verify.inputs import Call, Ints


@dataclass(frozen=True, slots=True)
class Chunk:
    """One execution of the engines, and where its tokens come from."""

    call: Call
    begin: int
    """Index of the first token among those that were to be run."""
    lengths: Ints
    """Number of real tokens of each sequence, [B]; the rest is padding."""


def chunks(tokens: Sequence[Sequence[int]], first: Sequence[int], most: int) -> Iterator[Chunk]:
    """Split the new tokens of each sequence, the first of which has the position `first`, into calls of at most `most` tokens.

    A sequence that has ended is padded from its end on: padding is written to slots after its last token, never over one.
    """
    ends, longest = np.array([len(row) for row in tokens]), max(len(row) for row in tokens)
    start = np.asarray(first, np.int64)
    for begin in range(0, longest, most):
        width = min(most, longest - begin)
        lengths = np.clip(ends - begin, 0, width).astype(np.int64)
        columns = np.arange(width)
        real = columns < lengths[:, None]
        ids = np.zeros(real.shape, np.int64)
        for row, count in enumerate(lengths):
            ids[row, :count] = tokens[row][begin : begin + count]
        write = start + np.minimum(begin, ends)
        positions = np.where(real, write[:, None] + columns, 0)
        positions[:, 0] = write
        yield Chunk(Call(ids, positions, write), begin, lengths)


def rows_of(call: Call) -> tuple[list[list[int]], list[int]]:
    """Return the real tokens of each sequence of a padded call, and the position of the first: what `chunks` takes."""
    counts = call.position_ids.max(axis=1) - call.write_indices + 1
    return [row[:count].tolist() for row, count in zip(call.input_ids, counts, strict=True)], call.write_indices.tolist()


def part_of(call: Call, rows: slice) -> Call:
    """Return the call for some of its sequences."""
    return Call(call.input_ids[rows], call.position_ids[rows], call.write_indices[rows])
