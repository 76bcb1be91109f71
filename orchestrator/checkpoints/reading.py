"""Reading rows of a source's tensors: as the format stores them, dequantized, or in another layout of the same codes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoints import format_named
from orchestrator.checkpoints.assembly import assembled
from orchestrator.model.checkpoint import Assembly, Piece, TensorInfo, View
from orchestrator.stores.source import ByteSource

if TYPE_CHECKING:
    from orchestrator.checkpoints.quantized.decoding import Dequantizer
    from orchestrator.checkpoints.quantized.recoding import Recoder
    from orchestrator.checkpoints.staging import Staging


class RowReader:
    """Reader of the tensors of an open source. Keeps what several rows of a quantized tensor share, until the last row."""

    def __init__(
        self, source_format: str, source: ByteSource, ahead: Iterable[TensorInfo] = (), scratch: Path | None = None
    ) -> None:
        """`ahead`: tensors that will be read, in about this order. `scratch`: folder for arrays that must be unpacked first."""
        self._format, self._source = format_named(source_format), source
        self._ahead, self._scratch = ahead, scratch
        self._staging: Staging | None = None
        self._dequantizer: Dequantizer | None = None
        self._recoder: Recoder | None = None
        self._copying = threading.Lock()
        self._block: tuple[tuple[Piece, ...], memoryview] | None = None

    def read(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        """Fill `out` with rows [begin, end) of the tensor's first axis, in the tensor's dtype and C order."""
        if tensor.array is not None and begin < end:
            self._stage(tensor, begin, end, out)
        elif tensor.assembly is not None and tensor.assembly.part is not None and begin < end:
            self._copy(tensor, tensor.assembly, begin, end, out)
        elif tensor.encoding is None or begin >= end:
            self._format.read_rows(self._source, tensor, begin, end, out)
        elif tensor.encoding.view is View.VALUES:
            self._dequantize(tensor, begin, end, out)
        else:
            self._recode(tensor, begin, end, out)

    def _copy(self, tensor: TensorInfo, assembly: Assembly, begin: int, end: int, out: memoryview) -> None:
        """Copy rows out of the block that the tensor is a part of, which is read whole, and once for the parts that follow."""
        assert assembly.part is not None
        with self._copying:
            held = self._block
            if held is None or held[0] != assembly.pieces:
                whole = assembled(tensor.name, tensor.dtype, replace(assembly, part=None))
                held = assembly.pieces, memoryview(bytearray(whole.num_bytes))
                self._format.read_rows(self._source, whole, 0, whole.shape[0], held[1])
                self._block = held
        row_bytes, first = tensor.num_bytes // tensor.shape[0], assembly.part[0]
        out[: (end - begin) * row_bytes] = held[1][(first + begin) * row_bytes : (first + end) * row_bytes]

    def _stage(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        if self._staging is None:
            from orchestrator.checkpoints.staging import Staging

            self._staging = Staging(self._source, self._ahead, self._scratch)
        self._staging.read(tensor, begin, end, out)

    def _dequantize(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        if self._dequantizer is None:
            from orchestrator.checkpoints.quantized.decoding import Dequantizer

            self._dequantizer = Dequantizer(self._source)
        self._dequantizer.read(tensor, begin, end, out)

    def _recode(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        if self._recoder is None:
            from orchestrator.checkpoints.quantized.recoding import Recoder

            self._recoder = Recoder(self._source)
        self._recoder.read(tensor, begin, end, out)
