"""Reading rows of a source's tensors: as the format stores them, dequantized, or in another layout of the same codes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoints import format_named
from orchestrator.model.checkpoint import TensorInfo, View
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

    def read(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        """Fill `out` with rows [begin, end) of the tensor's first axis, in the tensor's dtype and C order."""
        if tensor.array is not None and begin < end:
            self._stage(tensor, begin, end, out)
        elif tensor.encoding is None or begin >= end:
            self._format.read_rows(self._source, tensor, begin, end, out)
        elif tensor.encoding.view is View.VALUES:
            self._dequantize(tensor, begin, end, out)
        else:
            self._recode(tensor, begin, end, out)

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
