"""Reading rows of tensors that a source stores in pieces, or with the rows of a head in another order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from orchestrator.base.dtypes import num_bytes
from orchestrator.checkpoints.rows import read_contiguous_rows
from orchestrator.checkpoints.transposed import read_transposed_rows
from orchestrator.model.checkpoint import Assembly, Piece, TensorInfo
from orchestrator.stores.source import ByteSource

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]


def assembled(name: str, dtype: str, assembly: Assembly) -> TensorInfo:
    """Return the tensor of an assembly. Pieces are [rows] or [rows, columns], transposed ones [columns, rows]."""
    first = assembly.pieces[0]
    shapes = [piece.shape[::-1] if assembly.transposed else piece.shape for piece in assembly.pieces]
    shape = list(shapes[0])
    shape[assembly.axis] = sum(each[assembly.axis] for each in shapes)
    if assembly.part is not None:
        shape[0] = assembly.part[1] - assembly.part[0]
    return TensorInfo(name, dtype, tuple(shape), first.file, first.offset, num_bytes(dtype, math.prod(shape)), assembly)


def read_assembled_rows(source: ByteSource, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
    """Read rows [begin, end) of an assembled or contiguous tensor: `Format.read_rows` of Meta's and TensorRT-LLM's formats."""
    assembly = tensor.assembly
    if begin >= end:
        return
    if assembly is None:
        read_contiguous_rows(source, tensor, begin, end, out)
    elif assembly.part is not None:
        first = assembly.part[0]
        _read_stored(source, tensor, assembly, first + begin, first + end, out)
    elif assembly.paired_rows:
        _read_paired(source, tensor, assembly, begin, end, out)
    else:
        _read_stored(source, tensor, assembly, begin, end, out)
    if assembly is not None and assembly.add:
        import numpy as np

        elements = np.frombuffer(out, np.float32, (end - begin) * (tensor.num_bytes // tensor.shape[0]) // 4)
        np.add(elements, np.float32(assembly.add), out=elements)


def paired_order(begin: int, end: int, paired_rows: int) -> npt.NDArray[np.int64]:
    """Return the stored row of each row [begin, end) of a tensor whose heads have `paired_rows` rows.

    Rotary embedding turns the elements of a head in pairs. Meta's code pairs 2i and 2i + 1, transformers pairs i and half + i.
    So transformers' row (head, i) is Meta's (head, 2i), and (head, half + i) is Meta's (head, 2i + 1).
    Source: `permute` of transformers' convert_llama_weights_to_hf.py.
    """
    import numpy as np

    rows = np.arange(begin, end, dtype=np.int64)
    head, row = rows - rows % paired_rows, rows % paired_rows
    half = paired_rows // 2
    return head + 2 * (row % half) + row // half


def _read_paired(source: ByteSource, tensor: TensorInfo, assembly: Assembly, begin: int, end: int, out: memoryview) -> None:
    """Read the stored rows of [begin, end) and reorder them."""
    import numpy as np

    order = paired_order(begin, end, assembly.paired_rows)
    first, last = int(order.min()), int(order.max()) + 1
    row_bytes = tensor.num_bytes // tensor.shape[0]
    stored = np.empty((last - first, row_bytes), np.uint8)
    _read_stored(source, tensor, assembly, first, last, stored.reshape(-1).data)
    wanted = np.frombuffer(out, np.uint8, (end - begin) * row_bytes).reshape(end - begin, row_bytes)
    np.take(stored, order - first, axis=0, out=wanted, mode="clip")  # clip: without it numpy fills a second buffer


def _read_stored(source: ByteSource, tensor: TensorInfo, assembly: Assembly, begin: int, end: int, out: memoryview) -> None:
    """Read rows [begin, end) in the order of the source."""
    import numpy as np

    if assembly.transposed:
        read_transposed_rows(source, tensor, begin, end, out)
        return
    rows = np.frombuffer(out, np.uint8, (end - begin) * (tensor.num_bytes // tensor.shape[0])).reshape(end - begin, -1)
    position = 0
    for piece in assembly.pieces:
        if assembly.axis == 0:
            first, last = max(begin - position, 0), min(end - position, piece.shape[0])
            if first < last:
                into = rows[position + first - begin : position + last - begin]
                _read_piece(source, piece, tensor.dtype, first, into)
            position += piece.shape[0]
        else:
            columns = _row_bytes(piece, tensor.dtype)
            block = np.empty((end - begin, columns), np.uint8)
            _read_piece(source, piece, tensor.dtype, begin, block)
            rows[:, position : position + columns] = block
            position += columns


def _read_piece(source: ByteSource, piece: Piece, dtype: str, begin: int, out: Bytes) -> None:
    """Fill `out` with rows of a piece, from row `begin`."""
    offset = piece.offset + begin * _row_bytes(piece, dtype)
    source.read_into(piece.file, offset, out.reshape(-1).data)


def _row_bytes(piece: Piece, dtype: str) -> int:
    return num_bytes(dtype, math.prod(piece.shape[1:]))
