"""Strips of tensors that a source stores transposed: read wide, handed out by blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoints.transposed import STRIP_BYTES
from orchestrator.model.checkpoint import TensorInfo

Bytes = npt.NDArray[np.uint8]


class Strip:
    """The latest strip of rows: all rows of its tensor that are wanted, or as many as STRIP_BYTES hold.

    A block of rows is a narrow range of columns of what is stored. Read by itself it would be thousands of short runs.
    """

    def __init__(self, read_rows: Callable[[TensorInfo, int, int, Bytes], Bytes], of_size: Callable[[int], Bytes]) -> None:
        """`read_rows` fills a flat buffer with rows of a tensor, `of_size` returns the memory of the strip."""
        self._read_rows, self._of_size = read_rows, of_size
        self._name, self._rows = "", range(0)
        self._data = np.empty((0, 0), np.uint8)

    def copy_rows(self, tensor: TensorInfo, begin: int, end: int, last: int, flat: Bytes) -> Bytes:
        """Fill `flat` with rows [begin, end); rows up to `last` will be wanted next. Returns it as [rows, bytes per row]."""
        if begin == 0 and end == last:
            return self._read_rows(tensor, begin, end, flat)
        row_bytes, step = flat.size // (end - begin), end - begin
        if self._name != tensor.name or begin not in self._rows or end > self._rows.stop:
            self._name, self._rows = tensor.name, range(begin, min(last, begin + max(1, STRIP_BYTES // flat.size) * step))
            data = self._of_size(len(self._rows) * row_bytes)
            self._data = self._read_rows(tensor, self._rows.start, self._rows.stop, data)
        block = flat.reshape(step, row_bytes)
        np.copyto(block, self._data[begin - self._rows.start : end - self._rows.start])
        return block
