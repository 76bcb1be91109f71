"""Dequantization of rows while they are read: codes and scales in, elements of the model's dtype out.

Every format is one formula, (code - zero) * scale, computed in float32 and rounded once to nearest even. It gives the bits of the
library that defines the format: transformers (`Fp8Dequantize`, `convert_moe_packed_tensors`), compressed-tensors (`decompress`),
Model Optimizer (`NVFP4QTensor.dequantize`). Codes are unpacked in stretches that fit the processor's cache.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import MODEL_DTYPE_NAMES, numpy_dtype
from orchestrator.base.errors import DtypeError, SourceCorruptError
from orchestrator.model.checkpoint import Encoding, Packing, Stored, TensorInfo
from orchestrator.stores.source import ByteSource

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_STRETCH = 2**18
"""Elements that are dequantized at once."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_AWQ_BITS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of a word, from the lowest, that holds each of eight rows (`AWQ_PACK_ORDER` of AutoAWQ, inverted)."""


@dataclass(slots=True)
class _Kept:
    """State of a tensor between reads of its rows."""

    scale: Floats | None
    """[row blocks, column blocks]; None: scales are read with the rows."""
    second: np.float32 | None
    zero: Floats | None
    """[row blocks, column blocks]; None: none, or read with the rows."""
    order: npt.NDArray[np.int64] | None
    """Column block of each column."""
    columns: Floats | None
    codes: Bytes | None
    """All codes of a tensor whose rows are columns of its codes."""
    rows_left: int
    """Rows that were not read yet."""


class Dequantizer:
    """Reads rows of a source's quantized tensors. If every row is read once, so is every byte.

    Threads may read different tensors at once.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def read(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        """Fill `out` with rows [begin, end) of the tensor's first axis, in its dtype. Raises DtypeError when they exceed it."""
        encoding = tensor.encoding
        assert encoding is not None
        kept = self._kept_of(tensor, encoding)
        dtype = numpy_dtype(tensor.dtype)
        result = np.frombuffer(out, dtype, (end - begin) * (tensor.num_elements // tensor.shape[0]))
        if encoding.packing is Packing.EXPERTS:
            _, inner, rows = tensor.shape
            for number in range(begin, end):
                expert = result.reshape(end - begin, inner, rows)[number - begin]
                self._rows(tensor, kept, number * rows, (number + 1) * rows, inner, expert.T)
        else:
            self._rows(tensor, kept, begin, end, tensor.shape[-1], result.reshape(end - begin, -1))
        kept.rows_left -= end - begin
        if kept.rows_left <= 0:
            self._kept.pop(tensor.name, None)

    def _rows(self, tensor: TensorInfo, kept: _Kept, begin: int, end: int, inner: int, out: npt.NDArray[Any]) -> None:
        """Dequantize rows [begin, end) of [out, in] into `out`. Experts count as one matrix, one after the other."""
        encoding = tensor.encoding
        assert encoding is not None
        first = 0 if encoding.is_transposed else begin - begin % encoding.row_unit
        last = end + (-end) % encoding.row_unit
        stored = kept.codes if kept.codes is not None else self._stored_rows(encoding.codes, first, last, encoding.row_unit)
        scale = kept.scale if kept.scale is not None else self._scales_of_rows(encoding, encoding.scale, begin, end, kept)
        zero = kept.zero
        if zero is None and encoding.zero is not None:
            zero = _as_floats(self._stored_rows(encoding.zero, begin, end, 1), encoding.zero.dtype)
        step = max(1, _STRETCH // max(inner, 1))
        step = max(encoding.row_unit, step - step % encoding.row_unit)
        table = _table(encoding)
        for row in range(begin, end, step):
            upto = min(row + step, end)
            values = np.take(table, _codes(stored, encoding, inner, row - first, upto - first))
            base = 0 if kept.scale is not None else begin
            _scale_rows(values, encoding, scale, zero, kept, range(row, upto), base)
            self._round(tensor, values, out[row - begin : upto - begin])

    def _round(self, tensor: TensorInfo, values: Floats, out: npt.NDArray[Any]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = values.astype(out.dtype)
        if out.dtype == np.float16 and not np.isfinite(out).all() and np.isfinite(values).all():
            raise DtypeError(
                f"{tensor.name} holds {float(np.abs(values).max()):.6g}, {MODEL_DTYPE_NAMES['F16']} ends at 65504",
                "Use dtype bfloat16 or float32.",
            )

    def _kept_of(self, tensor: TensorInfo, encoding: Encoding) -> _Kept:
        with self._lock:
            if tensor.name in self._kept:
                return self._kept[tensor.name]
        second = None
        if encoding.second is not None:
            second = np.float32(_as_floats(self._whole(encoding.second), encoding.second.dtype).reshape(-1)[0])
        rows = tensor.shape[0]
        kept = _Kept(
            scale=None,
            second=second,
            zero=None,
            order=self._order(tensor, encoding),
            columns=None if encoding.columns is None else _flat(self._whole(encoding.columns), encoding.columns),
            codes=self._whole(encoding.codes) if encoding.is_transposed else None,
            rows_left=rows,
        )
        if not _has_a_scale_per_row(encoding):
            kept.scale = _combined(self._grid(encoding, encoding.scale, tensor), kept.second, encoding)
            kept.zero = self._zeros(encoding, tensor)
        elif encoding.zero is not None and encoding.zero.shape[0] != tensor.shape[0]:
            kept.zero = self._zeros(encoding, tensor)
        with self._lock:
            self._kept[tensor.name] = kept
        return kept

    def _whole(self, stored: Stored) -> Bytes:
        """Read a stored tensor, as [rows, bytes per row]."""
        return self._stored_rows(stored, 0, stored.shape[0] if stored.shape else 1, 1)

    def _stored_rows(self, stored: Stored, begin: int, end: int, unit: int) -> Bytes:
        """Read rows [begin, end) of the weight from a stored tensor whose rows hold `unit` of them each."""
        width = _row_bytes(stored, unit)
        data = np.empty((end - begin) // unit * width, np.uint8)
        self._source.read_into(stored.file, stored.offset + begin // unit * width, data.data)
        return data.reshape((end - begin) // unit, width)

    def _order(self, tensor: TensorInfo, encoding: Encoding) -> npt.NDArray[np.int64] | None:
        """Read the group of each input feature. Raises SourceCorruptError for one that has no scale."""
        if encoding.groups is None:
            return None
        order = self._whole(encoding.groups).reshape(-1).view("<i4").astype(np.int64)
        count = encoding.scale.shape[0]
        if order.min() < 0 or order.max() >= count:
            raise SourceCorruptError(f"{tensor.name}: g_idx holds {order.min()} to {order.max()}, there are {count} groups")
        return order

    def _grid(self, encoding: Encoding, stored: Stored, tensor: TensorInfo) -> Floats:
        """Read all scales, as [row blocks, column blocks] of [out, in]."""
        values = _as_floats(self._whole(stored), stored.dtype)
        if encoding.is_transposed:
            return np.ascontiguousarray(values.reshape(-1, tensor.shape[0]).T)
        return values.reshape(-(-tensor.shape[0] // encoding.block[0]), -1)

    def _zeros(self, encoding: Encoding, tensor: TensorInfo) -> Floats | None:
        """Read all zero points, as [rows, column blocks]."""
        if encoding.zero is None:
            return None
        raw = self._whole(encoding.zero)
        bits = 8 if encoding.number.endswith("8") else 4
        rows = tensor.shape[0]
        if encoding.packing is Packing.ROW_WORDS:
            return _awq_rows(raw, 0, rows).T.astype(np.float32)
        if encoding.packing is Packing.COLUMN_WORDS:  # [groups, out / n], packed along out
            codes = _unpacked(raw, bits)[:, :rows].T
            return codes.astype(np.float32) + np.float32(encoding.offset)
        if encoding.zero.dtype != "I32":
            return _as_floats(raw, encoding.zero.dtype).reshape(-(-rows // encoding.block[0]), -1)
        # compressed-tensors: int32 [out / n, blocks], packed along out
        words = np.ascontiguousarray(raw.reshape(len(raw), -1).view("<u4").T).view(np.uint8)
        return _unpacked(words, bits)[:, :rows].T.astype(np.float32) - np.float32(encoding.offset)

    def _scales_of_rows(self, encoding: Encoding, stored: Stored, begin: int, end: int, kept: _Kept) -> Floats:
        return _combined(_as_floats(self._stored_rows(stored, begin, end, 1), stored.dtype), kept.second, encoding)


def _has_a_scale_per_row(encoding: Encoding) -> bool:
    """Whether every row has scales of its own, which are then read with it."""
    return encoding.block[0] == 1 and not encoding.is_transposed


def _row_bytes(stored: Stored, unit: int) -> int:
    """Return the bytes of a row; rows of experts count over all experts."""
    if unit == 1 and len(stored.shape) >= 3:
        return stored.num_bytes // (stored.shape[0] * stored.shape[1])
    return stored.num_bytes // (stored.shape[0] if stored.shape else 1)


def _as_floats(raw: Bytes, dtype: str) -> Floats:
    """Widen scales or zero points [rows, bytes] to float32. U8 is an exponent with bias 127 (E8M0)."""
    rows = len(raw)
    if dtype == "U8":
        exponents: Floats = np.exp2(raw.astype(np.float32) - np.float32(127))
        return exponents.reshape(rows, -1)
    values: Floats = np.ascontiguousarray(raw).reshape(-1).view(numpy_dtype(dtype)).astype(np.float32)
    return values.reshape(rows, -1)


def _flat(raw: Bytes, stored: Stored) -> Floats:
    return _as_floats(raw, stored.dtype).reshape(-1)


def _combined(scale: Floats, second: np.float32 | None, encoding: Encoding) -> Floats:
    """Apply the scale of the scales, in float32."""
    if second is None:
        return scale
    return scale / second if encoding.divides else scale * second


def _table(encoding: Encoding) -> Floats:
    """Return the number of each code, less the offset of unsigned codes without stored zero points."""
    codes = np.arange(256, dtype=np.uint8)
    match encoding.number:
        case "E4M3":
            return codes.view(numpy_dtype("F8_E4M3")).astype(np.float32)
        case "E2M1":
            return np.array([*E2M1, *(-value for value in E2M1)], np.float32)
        case "S8":
            return codes.view(np.int8).astype(np.float32)
        case "S4":
            return np.array([*range(8), *range(-8, 0)], np.float32)
        case _:
            shift = 0 if encoding.is_transposed and encoding.zero is not None else encoding.offset
            return codes.astype(np.float32) - np.float32(shift)


def _codes(stored: Bytes, encoding: Encoding, inner: int, begin: int, end: int) -> Bytes:
    """Unpack the codes of rows [begin, end) of those in `stored`, as [rows, in]."""
    match encoding.packing:
        case Packing.BYTES:
            return stored[begin:end, :inner]
        case Packing.ROW_PAIRS:
            pairs = stored[begin // 2 : (end + 1) // 2]
            both = np.stack([pairs & 0x0F, pairs >> 4], axis=1).reshape(-1, inner)
            return both[begin % 2 : begin % 2 + end - begin]
        case Packing.COLUMN_WORDS:
            return _gptq_rows(stored, 8 if encoding.number == "U8" else 4, begin, end)
        case Packing.ROW_WORDS:
            return np.ascontiguousarray(_awq_rows(stored, begin, end).T)
        case _:
            return nibbles(stored[begin:end])[:, :inner]


def nibbles(packed: Bytes) -> Bytes:
    """Unpack [rows, bytes] to [rows, 2 * bytes], low nibbles first."""
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(len(packed), -1)


def _unpacked(packed: Bytes, bits: int) -> Bytes:
    return nibbles(packed) if bits == 4 else packed


def _gptq_rows(stored: Bytes, bits: int, begin: int, end: int) -> Bytes:
    """Return rows [begin, end) of a weight whose int32 words [in / n, out] hold n input features each."""
    words = np.ascontiguousarray(stored.reshape(len(stored), -1).view("<u4")[:, begin:end].T)
    return _unpacked(words.view(np.uint8), bits)


def _awq_rows(stored: Bytes, begin: int, end: int) -> Bytes:
    """Return columns [begin, end) of the matrix [rows, n] whose int32 words [rows, n / 8] hold eight columns each."""
    words = stored.reshape(len(stored), -1).view("<u4")[:, begin // 8 : -(-end // 8)]
    parts = [((words >> np.uint32(4 * bit)) & np.uint32(15)).astype(np.uint8) for bit in _AWQ_BITS]
    return np.stack(parts, axis=-1).reshape(len(stored), -1)[:, begin % 8 : begin % 8 + end - begin]


def _scale_rows(
    values: Floats, encoding: Encoding, scale: Floats, zero: Floats | None, kept: _Kept, rows: range, base: int
) -> None:
    """Subtract zero points and multiply by scales, in place. Row `base` of the weight is row 0 of `scale`."""
    height, width = encoding.block
    blocks = _of_rows(scale, rows, height, base)
    zeros = None if zero is None else _of_rows(zero, rows, height, 0 if kept.zero is not None else base)
    if kept.order is not None:
        values -= zeros[:, kept.order] if zeros is not None else np.float32(0)
        values *= blocks[:, kept.order]
    else:
        _apply(values, np.subtract, zeros, width)
        _apply(values, np.multiply, blocks, width)
    if kept.columns is not None:
        values *= kept.columns


def _of_rows(grid: Floats, rows: range, height: int, base: int) -> Floats:
    """Return the grid's row of each of `rows`: [rows, column blocks], or [1, column blocks] if they share it."""
    first, last = (rows.start - base) // height, (rows.stop - 1 - base) // height
    if first == last and height > 1:
        return grid[first : first + 1]
    if height == 1:
        return grid[rows.start - base : rows.stop - base]
    return grid[(np.arange(rows.start, rows.stop) - base) // height]


def _apply(values: Floats, operation: np.ufunc, grid: Floats | None, width: int) -> None:
    """Combine values [rows, in] with one number per block of `width` columns, in place. The last block may be narrower."""
    if grid is None:
        return
    inner = values.shape[1]
    if grid.shape[1] == 1:
        operation(values, grid, out=values)
        return
    whole = inner // width
    body = values[:, : whole * width].reshape(len(values), whole, width)
    if whole * width == inner:
        operation(body, grid[:, :whole, None], out=body)
        return
    operation(values, np.repeat(grid, width, axis=1)[:, :inner], out=values)
