"""Reading rows of tensors that a source stores contiguously."""

from __future__ import annotations

from orchestrator.model.checkpoint import TensorInfo
from orchestrator.stores.source import ByteSource


def read_contiguous_rows(source: ByteSource, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
    """Read rows [begin, end) of a contiguous tensor: `Format.read_rows` of most formats."""
    rows = tensor.shape[0] if tensor.shape else 1
    row_bytes = tensor.num_bytes // rows if rows else 0
    source.read_into(tensor.file, tensor.offset + begin * row_bytes, out[: (end - begin) * row_bytes])
