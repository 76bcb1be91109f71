"""The inner loop of conversion: read large blocks once, cut them for all ranks, append to every rank's file.

Memory is a few blocks, whatever the model's size; only a source tensor that two targets of one task share (a tied
embedding and head on one stage) is held whole from its first use to its last. Reading the next block overlaps with
cutting, hashing and writing this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.core.checkpoint import TensorInfo
from orchestrator.core.dtypes import MODEL_DTYPE_NAMES, num_bytes
from orchestrator.core.errors import DtypeError
from orchestrator.core.rules import Span
from orchestrator.core.targets import Read, Target
from orchestrator.work.packing import Packer
from orchestrator.work.scales import Scales

Bytes = npt.NDArray[np.uint8]
BLOCK_BYTES = 16 * 2**20
_ZERO_BYTES = 2**20


ReadRows = Callable[[TensorInfo, int, int, memoryview], None]
"""Fills a buffer with rows [begin, end) of a source tensor."""


class Sink(Protocol):
    """One rank's file, written from front to back."""

    def write(self, data: memoryview) -> Any: ...


class Cutter:
    """Runs targets in order against one sink per tensor-parallel rank."""

    def __init__(
        self, read_rows: ReadRows, sinks: Sequence[Sink], progress: Callable[[int], None], scales: Scales | None = None
    ) -> None:
        self.not_finite: list[str] = []
        """Source tensors that hold NaN or infinity, in order of discovery."""
        self._read, self._sinks, self._progress = read_rows, sinks, progress
        self._reader = ThreadPoolExecutor(1, "read")
        self._writers = ThreadPoolExecutor(min(len(sinks), 4), "write")
        self._buffers = [np.empty(0, np.uint8) for _ in range(3)]
        self._held: dict[str, Bytes] = {}
        self._packer = Packer(len(sinks), scales)

    def run(self, targets: Sequence[Target]) -> None:
        """Write every target. Raises SourceCorruptError, DtypeError, QuantizationError, StoreError."""
        reads = [read for target in targets for read in target.reads]
        last = {read.tensor.name: number for number, read in enumerate(reads)}
        shared = _read_twice(reads)
        number = 0
        try:
            for target in targets:
                for position, read in enumerate(target.reads):
                    name = read.tensor.name
                    if name in shared and name not in self._held:
                        self._held[name] = self._read_whole(read.tensor)
                    self._run_read(target, position)
                    if last[name] == number:
                        self._held.pop(name, None)
                    number += 1
                if target.scale is not None:
                    for sink, data in zip(self._sinks, self._packer.scales_of(target), strict=True):
                        sink.write(data)
        finally:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._writers.shutdown(wait=True, cancel_futures=True)

    @property
    def quantization_errors(self) -> dict[str, float]:
        """By linear, |stored - weight| / |weight|."""
        return self._packer.errors()

    def _run_read(self, target: Target, position: int) -> None:
        read = target.reads[position]
        tensor = read.tensor
        pending: list[Future[None]] = []
        for row, block in self._blocks(read, 2 if target.quantized else 1):
            if not is_finite(block, tensor.dtype) and tensor.name not in self.not_finite:
                self.not_finite.append(tensor.name)
            pieces = self._converted(target, position, row, block)
            _finish(pending)  # a sink takes its pieces in order, and errors must surface
            pending = [self._writers.submit(_append, sink, piece) for sink, piece in pieces]
        _finish(pending)
        self._pad(read, target.dtype)

    def _converted(self, target: Target, position: int, row: int, block: Bytes) -> Iterable[tuple[Sink, Bytes]]:
        """What each rank takes of a block, as its file stores it."""
        read, quantized = target.reads[position], target.quantized
        dtype = quantized.dtype if quantized else target.dtype
        if read.tensor.dtype != dtype or read.add:
            block = cast(block, read.tensor, dtype, read.add)
        if quantized is None:
            return self._pieces(read, row, block)
        return ((self._sinks[rank], piece) for rank, piece in self._packer.pack(target, position, row, block))

    def _blocks(self, read: Read, row_unit: int) -> Iterator[tuple[int, Bytes]]:
        """(first row, rows x bytes-per-row) of the rows that any rank takes; the next block is read while one is used.

        A block holds a multiple of `row_unit` rows (1 or 2): some formats pack two rows into a byte.
        """
        tensor = read.tensor
        row_bytes = _rows(tensor)[1]
        first, last = _wanted_rows(read)
        if first >= last or row_bytes == 0:
            return
        step = max(1, BLOCK_BYTES // row_bytes)
        step += step % row_unit
        starts = range(first, last, step)
        held = self._held.get(tensor.name)
        if held is not None:
            for row in starts:
                yield row, held[row : min(row + step, last)]
            return
        ahead = self._reader.submit(self._read_rows, tensor, first, min(first + step, last), 0)
        for number, row in enumerate(starts):
            block = ahead.result()
            following = row + step
            if following < last:
                ahead = self._reader.submit(self._read_rows, tensor, following, min(following + step, last), number + 1)
            yield row, block
            # Three buffers: one being read, one just yielded, one whose writers may not be through yet.

    def _read_rows(self, tensor: TensorInfo, begin: int, end: int, number: int) -> Bytes:
        row_bytes = _rows(tensor)[1]
        size = (end - begin) * row_bytes
        slot = number % len(self._buffers)
        if self._buffers[slot].size < size:
            self._buffers[slot] = np.empty(max(size, BLOCK_BYTES), np.uint8)
        flat = self._buffers[slot][:size]
        self._read(tensor, begin, end, flat.data)
        self._progress(size)
        return flat.reshape(end - begin, row_bytes)

    def _read_whole(self, tensor: TensorInfo) -> Bytes:
        whole = np.empty(tensor.num_bytes, np.uint8)
        self._read(tensor, 0, _rows(tensor)[0], whole.data)
        self._progress(tensor.num_bytes)
        return whole.reshape(_rows(tensor))

    def _pieces(self, read: Read, row: int, block: Bytes) -> Iterator[tuple[Sink, Bytes]]:
        """What each rank takes of a block."""
        if read.axis is None:
            for sink in self._sinks:
                yield sink, block
            return
        unit = block.shape[1] // read.tensor.shape[1] if read.axis == 1 else 0
        for sink, span in self._takers(read):
            if read.axis == 1:
                yield sink, block[:, span.begin * unit : span.end * unit]
                continue
            begin, end = max(span.begin - row, 0), min(span.end - row, len(block))
            if begin < end:
                yield sink, block[begin:end]

    def _takers(self, read: Read) -> Iterator[tuple[Sink, Span]]:
        """The sinks that take something of a cut read, with their spans."""
        ranks = read.ranks or range(len(self._sinks))
        return ((self._sinks[rank], span) for rank, span in zip(ranks, read.spans, strict=True))

    def _pad(self, read: Read, dtype: str) -> None:
        row_bytes = num_bytes(dtype, read.tensor.num_elements // max(read.tensor.shape[0], 1))
        zeros = memoryview(bytes(_ZERO_BYTES))
        for sink, span in self._takers(read) if read.spans else ():
            left = span.pad * row_bytes
            while left:
                count = min(left, len(zeros))
                sink.write(zeros[:count])
                left -= count


def _rows(tensor: TensorInfo) -> tuple[int, int]:
    """A tensor as rows of its first axis: number of rows, bytes of one."""
    rows = tensor.shape[0] if tensor.shape else 1
    return rows, tensor.num_bytes // rows if rows else 0


def _wanted_rows(read: Read) -> tuple[int, int]:
    """[first, last) of the rows that some rank takes; all of them unless axis 0 is cut."""
    if read.axis != 0:
        return 0, _rows(read.tensor)[0]
    taken = [span for span in read.spans if span.begin < span.end]
    return min((span.begin for span in taken), default=0), max((span.end for span in taken), default=0)


def _read_twice(reads: Iterable[Read]) -> set[str]:
    """Source tensors of which several reads want the same rows: those are held, so that no byte is read twice."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for read in reads:
        rows.setdefault(read.tensor.name, []).append(_wanted_rows(read))
    return {name for name, taken in rows.items() if any(one[1] > two[0] for one, two in itertools.pairwise(sorted(taken)))}


def _append(sink: Sink, piece: Bytes) -> None:
    sink.write(np.ascontiguousarray(piece).reshape(-1).data)


def _finish(jobs: list[Future[None]]) -> None:
    wait(jobs)
    for job in jobs:
        job.result()


_INFINITY_BITS: dict[str, tuple[str, str, int]] = {
    "BF16": ("i2", "u2", 0x7F80),
    "F16": ("i2", "u2", 0x7C00),
    "F32": ("i4", "u4", 0x7F800000),
}
"""Signed and unsigned integers of a dtype's size, and the bits of its positive infinity."""


def is_finite(block: Bytes, dtype: str) -> bool:
    """Whether a block holds no NaN and no infinity. Dtypes without a fast test pass.

    Read as integers, whatever is not finite is largest: among the positive ones as signed, among all as unsigned with the
    sign bit on top. Two maxima cost a tenth of sha256.
    """
    if dtype not in _INFINITY_BITS or not block.size:
        return True
    signed, unsigned, infinity = _INFINITY_BITS[dtype]
    flat = np.ascontiguousarray(block).reshape(-1)
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    return int(flat.view(signed).max()) < infinity and int(flat.view(unsigned).max()) < sign + infinity


def cast(block: Bytes, tensor: TensorInfo, dtype: str, add: float = 0.0) -> Bytes:
    """Round a block of rows to another floating-point dtype, to nearest even; `add` is added before, in float32.

    Raises DtypeError when a finite value becomes infinite (float16 ends at 65504).
    """
    import torch

    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    if tensor.dtype not in kinds:
        raise DtypeError(f"{tensor.name} is {tensor.dtype}, which cannot be converted to {dtype}")
    source = torch.from_numpy(block.reshape(-1)).view(kinds[tensor.dtype])
    result = (source.float() + add if add else source).to(kinds[dtype])
    if kinds[dtype].itemsize <= kinds[tensor.dtype].itemsize and bool((torch.isinf(result) & torch.isfinite(source)).any()):
        peak, limit = float(source.abs().max()), torch.finfo(kinds[dtype]).max
        raise DtypeError(
            f"{tensor.name} holds {peak:.6g}, {MODEL_DTYPE_NAMES[dtype]} ends at {limit:.6g}",
            "Use dtype bfloat16 or float32." if dtype == "F16" else "Use dtype float32.",
        )
    flat: Bytes = result.view(torch.uint8).numpy()
    return flat.reshape(len(block), -1)
