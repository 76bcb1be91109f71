"""Quantization inside the inner loop of conversion: blocks of whole rows in, each rank's stored rows out.

Scales that result from packing wait in memory until the weight is written (at most 1/16 of its size), because a rank's file is
written from front to back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import ARRAY_NAMES, numpy_dtype
from orchestrator.base.errors import BUG, QuantizationError
from orchestrator.model.quantization import LinearFormat, global_name
from orchestrator.model.rules import Span
from orchestrator.model.targets import ArtifactScale, PackedScale, Read, Target
from orchestrator.planning.calibration import layer_of
from orchestrator.quantizers.formats import PackedRows, pack_rows, smoothed, unpack_rows
from orchestrator.work.scales import Scales, has_tensor_scale

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]
_ROWS_BYTES = 4 * 2**20
"""Size of the parts in which rows are packed: the float32 copies of a part stay in the processor's cache."""


class Packer:
    """Packer of one conversion task, with the scales that it applies and those that result."""

    def __init__(self, num_ranks: int, scales: Scales | None) -> None:
        self._num_ranks, self._scales = num_ranks, scales
        self._found: dict[str, list[list[Bytes]]] = {}
        """Scales that result from packing, by weight and rank."""
        self._squares: dict[str, list[float]] = {}
        """Sum of squared errors and sum of squared elements, by linear."""

    def errors(self) -> dict[str, float]:
        """Return |stored - weight| / |weight| of smoothed weights in Frobenius norms, by linear (global layer numbers)."""
        return {name: (error / max(square, 1e-30)) ** 0.5 for name, (error, square) in self._squares.items()}

    def pack(self, target: Target, position: int, row: int, block: Bytes) -> Iterator[tuple[int, Bytes]]:
        """Yield (rank, stored bytes) for a block of `target.reads[position]` from `row` on. Raises QuantizationError."""
        read = target.reads[position]
        assert target.quantized is not None
        step = max(2, _ROWS_BYTES // max(block.shape[1], 1) // 2 * 2)
        for begin in range(0, len(block), step):
            part = block[begin : begin + step]
            packed = self._packed(target, position, part)
            yield from self._cut(target.name, read, row + begin, len(part), packed)

    def _packed(self, target: Target, position: int, block: Bytes) -> PackedRows:
        assert target.quantized is not None
        quantized = target.quantized
        fmt, module = quantized.format, quantized.modules[position]
        rows = _as_tensor(block, quantized.dtype)
        if fmt.pre_quant_scale:
            rows = smoothed(rows, *(self._vector(module, name) for name in ("smooth", "own_pre_quant_scale", "pre_quant_scale")))
        amax = (
            self._artifact().largest(quantized.amax_modules[position], ("weight_amax",)) if has_tensor_scale(fmt.weight) else None
        )
        packed = pack_rows(rows, fmt, amax)
        self._measure(_global_linear(target.name, module), rows, packed, fmt, amax)
        return packed

    def _measure(self, linear: str, rows: torch.Tensor, packed: PackedRows, fmt: LinearFormat, amax: float | None) -> None:
        error = unpack_rows(packed.weight, fmt, packed.scales, amax) - rows.float()
        squares = self._squares.setdefault(linear, [0.0, 0.0])
        squares[0] += float(error.square().sum())
        squares[1] += float(rows.float().square().sum())

    def _artifact(self) -> Scales:
        if self._scales is None:
            raise QuantizationError("there is no calibration artifact to quantize with", BUG)
        return self._scales

    def _vector(self, module: str, quantity: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._artifact().vector(module, quantity))

    def _cut(self, weight: str, read: Read, row: int, num_rows: int, packed: PackedRows) -> Iterator[tuple[int, Bytes]]:
        """Yield each rank's piece of packed rows, and keep its piece of their scales."""
        stored, scales = packed.weight.numpy(), _as_bytes(packed.scales)
        inner = read.shape[1]
        for rank, span in _takers(read, self._num_ranks):
            piece = _piece(stored, read.axis, span, row, num_rows, inner)
            if piece is None:
                continue
            yield rank, piece
            if scales is not None:
                is_vector = packed.scales is not None and packed.scales.dim() == 1
                kept = _piece(scales, None if is_vector and read.axis == 1 else read.axis, span, row, num_rows, inner)
                assert kept is not None
                found = self._found.setdefault(weight, [[] for _ in range(self._num_ranks)])
                found[rank].append(np.array(kept))

    def scales_of(self, target: Target) -> Iterator[memoryview]:
        """Yield the bytes of a scale tensor for every rank, in order. Raises QuantizationError when the artifact lacks a scale."""
        if isinstance(target.scale, PackedScale):
            for pieces in self._found.pop(target.scale.weight):
                yield np.concatenate([piece.reshape(-1) for piece in pieces]).data
            return
        assert isinstance(target.scale, ArtifactScale)
        for rank in range(self._num_ranks):
            yield _rounded(self._artifact().artifact_scale(target.scale, rank), target.dtype)


def _global_linear(target: str, module: str) -> str:
    local = int(target.split(".", 3)[2])
    return global_name(target.removesuffix(".weight"), local, layer_of(module))


def _takers(read: Read, num_ranks: int) -> Iterator[tuple[int, Span | None]]:
    """Yield the ranks that take a part of a read, each with its span; None: the whole read."""
    ranks = read.ranks or range(num_ranks)
    return zip(ranks, read.spans if read.axis is not None else [None] * len(ranks), strict=True)


def _piece(block: Bytes, axis: int | None, span: Span | None, row: int, num_rows: int, inner: int) -> Bytes | None:
    """Return the part of stored rows in `span` (rows and columns of the source), for any packing; None: no part of them."""
    if axis is None or span is None:
        return block
    if axis == 1:
        width = block.shape[1]
        return block[:, span.begin * width // inner : span.end * width // inner]
    begin, end = max(span.begin - row, 0), min(span.end - row, num_rows)
    if begin >= end:
        return None
    return block[begin * len(block) // num_rows : end * len(block) // num_rows]


def _as_tensor(block: Bytes, dtype: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(block)).view(getattr(torch, ARRAY_NAMES[dtype]))


def _as_bytes(scales: torch.Tensor | None) -> Bytes | None:
    """View scales as bytes [rows, bytes per row]."""
    import torch

    if scales is None:
        return None
    flat: Bytes = scales.reshape(len(scales), -1).contiguous().view(torch.uint8).numpy()
    return flat


def _rounded(values: npt.NDArray[np.float32], dtype: str) -> memoryview:
    return np.ascontiguousarray(values.astype(numpy_dtype(dtype))).view(np.uint8).reshape(-1).data
