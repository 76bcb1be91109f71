"""Reading rows of tensors that a source stores as columns: JAX and Keras keep kernels as [in, out], a row of ours is a column.

A range of columns lies in runs, one in each stored row. They are read by slabs of stored rows, which are transposed while they
are in the processor's cache. Wide ranges make long runs: conversions read STRIP_BYTES of a tensor at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.base.dtypes import ITEM_BITS
from orchestrator.model.checkpoint import Piece, TensorInfo
from orchestrator.stores.source import ByteSource

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

STRIP_BYTES = 512 * 2**20
"""Most bytes of a transposed tensor that a conversion holds: all of it, or a strip of its rows."""
SLAB_BYTES = 16 * 2**20
"""Stored bytes that are read and transposed at once."""
_TILE = 128
"""Stored rows that are transposed at once: their parts of a stretch of columns fit the cache."""


def read_transposed_rows(source: ByteSource, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
    """Fill `out` with rows [begin, end) of a tensor whose pieces are stored as [columns, rows]. Reads no other byte."""
    import numpy as np

    assert tensor.assembly is not None
    itemsize = ITEM_BITS[tensor.dtype] // 8
    rows = np.frombuffer(out, f"u{itemsize}", (end - begin) * tensor.shape[1]).reshape(end - begin, tensor.shape[1])
    position = 0
    for piece in tensor.assembly.pieces:
        first, last = max(begin - position, 0), min(end - position, piece.shape[1])
        if first < last:
            _read_columns(source, piece, first, last, rows[position + first - begin : position + last - begin])
        position += piece.shape[1]


def _read_columns(source: ByteSource, piece: Piece, first: int, last: int, out: npt.NDArray[np.unsignedinteger]) -> None:
    """Fill `out`, [last - first, columns], with columns [first, last) of a piece [columns, rows]."""
    import numpy as np

    count, width = piece.shape
    stored_bytes, run_bytes, skip = width * out.itemsize, (last - first) * out.itemsize, first * out.itemsize
    step = max(_TILE, SLAB_BYTES // run_bytes // _TILE * _TILE)
    slab = np.empty((min(step, count), last - first), out.dtype)
    for row in range(0, count, step):
        stored = slab[: min(step, count - row)]
        if run_bytes == stored_bytes:
            source.read_into(piece.file, piece.offset + row * stored_bytes, stored.reshape(-1).view(np.uint8).data)
        else:
            for number, run in enumerate(stored.view(np.uint8)):
                source.read_into(piece.file, piece.offset + (row + number) * stored_bytes + skip, run.data)
        for tile in range(0, len(stored), _TILE):
            out[:, row + tile : row + tile + _TILE] = stored[tile : tile + _TILE].T
