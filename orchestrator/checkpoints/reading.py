"""Reading rows of a source's tensors, as the format stores them or dequantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.checkpoints import format_named
from orchestrator.model.checkpoint import TensorInfo
from orchestrator.stores.source import ByteSource

if TYPE_CHECKING:
    from orchestrator.checkpoints.quantized.decoding import Dequantizer


class RowReader:
    """Reader of the tensors of an open source. Keeps what several rows of a quantized tensor share, until the last row."""

    def __init__(self, source_format: str, source: ByteSource) -> None:
        self._format, self._source = format_named(source_format), source
        self._dequantizer: Dequantizer | None = None

    def read(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        """Fill `out` with rows [begin, end) of the tensor's first axis, in the tensor's dtype and C order."""
        if tensor.encoding is None or begin >= end:
            self._format.read_rows(self._source, tensor, begin, end, out)
            return
        if self._dequantizer is None:
            from orchestrator.checkpoints.quantized.decoding import Dequantizer

            self._dequantizer = Dequantizer(self._source)
        self._dequantizer.read(tensor, begin, end, out)
