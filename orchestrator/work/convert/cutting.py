"""The inner loop of conversion: read large blocks once, cut them for all ranks, append them to every rank's file.

Memory is a few blocks, whatever the model's size. Only a source tensor that two targets of one task share (a tied embedding and
head on one stage) is held whole, from first to last use, and of one that the source stores transposed a strip is held. One thread
reads ahead, across tensors, and each sink has its own thread: reading, hashing and writing overlap, and every sink still gets its
bytes in order.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import MODEL_DTYPE_NAMES, num_bytes, numpy_dtype
from orchestrator.base.errors import DtypeError, QuantizationError
from orchestrator.base.pages import page_buffer
from orchestrator.model.checkpoint import TensorInfo
from orchestrator.model.rules import Span
from orchestrator.model.targets import ExpertRows, Read, StoredScale, Target
from orchestrator.work.context import HashingWriter, SharedBlock
from orchestrator.work.convert.packing import Packer
from orchestrator.work.convert.strips import Strip
from orchestrator.work.scales import Scales

Bytes = npt.NDArray[np.uint8]
BLOCK_BYTES = 16 * 2**20
_BLOCKS_BEHIND = 1
"""Blocks that may still be written while the next is cut and the one after it is read."""
_ZERO_BYTES = 2**20


ReadRows = Callable[[TensorInfo, int, int, memoryview], None]
"""Fills a buffer with rows [begin, end) of a source tensor."""


class Sink(Protocol):
    """File of one rank, written from front to back."""

    def write(self, data: memoryview) -> Any: ...


class _Chunk(NamedTuple):
    """Rows [begin, end) of one of a target's reads. Empty for a scale, and for a read of which no rank takes a row."""

    target: Target
    position: int
    begin: int
    end: int
    last: bool
    """True for the last chunk of a read."""

    @property
    def read(self) -> Read:
        return self.target.reads[self.position]


class Cutter:
    """Runs targets in order, with one sink per tensor-parallel rank."""

    def __init__(
        self, read_rows: ReadRows, sinks: Sequence[Sink], progress: Callable[[int], None], scales: Scales | None = None
    ) -> None:
        self.not_finite: list[str] = []
        """Source tensors that hold NaN or infinity, in order of discovery."""
        self._read, self._sinks, self._progress = read_rows, sinks, progress
        self._reader = ThreadPoolExecutor(1, "read")
        self._writers = [ThreadPoolExecutor(1, "write") for _ in sinks]
        self._packed = [_Buffer() for _ in sinks]
        # One is read, one is cut, the others are written.
        self._buffers = itertools.cycle([_Buffer() for _ in range(_BLOCKS_BEHIND + 2)])
        self._held: dict[str, Bytes] = {}
        self._strip = Strip(self._read_rows, _Buffer().of_size)
        self._packer = Packer(len(sinks), scales)

    def run(self, targets: Sequence[Target]) -> None:
        """Write every target. Raises SourceCorruptError, DtypeError, QuantizationError, StoreError."""
        behind: deque[list[Future[None]]] = deque()
        try:
            for chunk, block in self._blocks(targets):
                behind.append(self._run_chunk(chunk, block))
                if len(behind) > _BLOCKS_BEHIND:  # its buffer is the next to be read into; and errors must surface
                    _finish(behind.popleft())
            while behind:
                _finish(behind.popleft())
        finally:
            for pool in (self._reader, *self._writers):
                pool.shutdown(wait=True, cancel_futures=True)

    @property
    def quantization_errors(self) -> dict[str, float]:
        """|stored - weight| / |weight| by linear, in Frobenius norms."""
        return self._packer.errors()

    def _run_chunk(self, chunk: _Chunk, block: Bytes) -> list[Future[None]]:
        """Check and cut a block, and start its writes."""
        target = chunk.target
        if isinstance(target.scale, StoredScale):
            values = self._stored_scale(target.name, target.scale)
            return [self._writers[rank].submit(self._sinks[rank].write, data) for rank, data in enumerate(values)]
        if target.scale is not None:
            scales = enumerate(self._packer.scales_of(target))
            return [self._writers[rank].submit(self._sinks[rank].write, data) for rank, data in scales]
        tensor = chunk.read.tensor
        jobs: list[Future[None]] = []
        if block.size:
            if not is_finite(block, tensor.dtype) and tensor.name not in self.not_finite:
                self.not_finite.append(tensor.name)
            pieces = self._converted(target, chunk.position, chunk.begin, block)
            jobs = [self._writers[rank].submit(self._append, rank, piece) for rank, piece in pieces]
        return [*jobs, *self._pad(chunk.read, target.dtype)] if chunk.last else jobs

    def _stored_scale(self, name: str, scale: StoredScale) -> list[memoryview]:
        """Return the bytes of a scale for every rank. Raises QuantizationError when joined weights have different scales."""
        distinct = {(tensor.file, tensor.offset, tensor.name): tensor for tensor in scale.tensors()}
        numbers = {key: self._reader.submit(self._stored_number, tensor) for key, tensor in distinct.items()}
        found = []
        for entries in scale.entries:
            values = np.empty(len(entries), np.float32)
            for at, entry in enumerate(entries):
                each = [numbers[tensor.file, tensor.offset, tensor.name].result() for tensor in entry]
                if scale.must_agree and len(set(each)) > 1:
                    shown = ", ".join(f"{tensor.name} {value:.6g}" for tensor, value in zip(entry, each, strict=True))
                    raise QuantizationError(
                        f"{name} joins weights that the source stores with different scales: {shown}",
                        "Exclude this linear (quantization.exclude), or leave `algorithm: source` out, to dequantize.",
                    )
                values[at] = max(np.float32(1) / number if scale.divides else number for number in each)
            found.append(values.view(np.uint8).data)
        return found

    def _stored_number(self, tensor: TensorInfo) -> np.float32:
        data = bytearray(tensor.num_bytes)
        self._read(tensor, 0, 1, memoryview(data))
        self._progress(tensor.stored_bytes)
        return np.float32(np.frombuffer(data, numpy_dtype(tensor.dtype))[0])

    def _converted(self, target: Target, position: int, row: int, block: Bytes) -> Iterable[tuple[int, Bytes | SharedBlock]]:
        """Yield each rank's piece of a block, as its file stores it."""
        read, quantized = target.reads[position], target.quantized
        dtype = quantized.dtype if quantized else target.dtype
        if read.tensor.dtype != dtype or read.add:
            block = cast(block, read.tensor, dtype, read.add)
        return self._pieces(read, row, block) if quantized is None else self._packer.pack(target, position, row, block)

    def _blocks(self, targets: Sequence[Target]) -> Iterator[tuple[_Chunk, Bytes]]:
        """Yield the rows of every read, as [rows, bytes per row]. The next block is read meanwhile, across tensors too."""
        reads = [read for target in targets for read in target.reads]
        shared = _read_twice(reads)
        uses = Counter(read.name for read in reads)
        ahead: deque[tuple[_Chunk, Future[Bytes]]] = deque()
        for chunk in itertools.chain.from_iterable(map(_chunks, targets)):
            hold = drop = False
            if chunk.target.reads:
                name = chunk.read.name
                uses[name] -= chunk.last
                hold, drop = name in shared, not uses[name]
            ahead.append((chunk, self._reader.submit(self._read_chunk, chunk, hold, drop)))
            if len(ahead) > 1:
                yield _result(ahead)
        while ahead:
            yield _result(ahead)

    def _read_chunk(self, chunk: _Chunk, hold: bool, drop: bool) -> Bytes:
        """Read the rows of a chunk into the next buffer, or slice them from a tensor that is held until its last use."""
        if chunk.begin == chunk.end:
            return np.empty(0, np.uint8)
        tensor = chunk.read.tensor
        if chunk.read.rows is not None:
            return self._read_expert(chunk, chunk.read.rows, drop)
        row_bytes = _rows(chunk.read)[1]
        if hold:
            if tensor.name not in self._held:
                self._held[tensor.name] = self._read_rows(tensor, 0, _rows(chunk.read)[0], _Buffer().of_size(tensor.num_bytes))
            return (self._held.pop(tensor.name) if drop else self._held[tensor.name])[chunk.begin : chunk.end]
        flat = next(self._buffers).of_size((chunk.end - chunk.begin) * row_bytes)
        if tensor.is_transposed:
            return self._strip.copy_rows(tensor, chunk.begin, chunk.end, _wanted_rows(chunk.read)[1], flat)
        return self._read_rows(tensor, chunk.begin, chunk.end, flat)

    def _read_rows(self, tensor: TensorInfo, begin: int, end: int, flat: Bytes) -> Bytes:
        self._read(tensor, begin, end, flat.data)
        self._progress(flat.size * tensor.stored_bytes // tensor.num_bytes)
        return flat.reshape(end - begin, -1)

    def _read_expert(self, chunk: _Chunk, rows: ExpertRows, drop: bool) -> Bytes:
        """Copy rows of an expert's part out of the expert's slab, which is read once and held until its last use."""
        name, tensor = chunk.read.name, chunk.read.tensor
        if name not in self._held:
            size = tensor.num_bytes // tensor.shape[0]
            self._held[name] = self._read_rows(tensor, rows.expert, rows.expert + 1, _Buffer().of_size(size))
        slab = self._held.pop(name) if drop else self._held[name]
        elements = slab.view(f"V{tensor.num_bytes // tensor.num_elements}").reshape(tensor.shape[1:])
        part = (elements.T if rows.transposed else elements)[rows.first :: rows.step][chunk.begin : chunk.end]
        copied: Bytes = np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1)
        return copied

    def _pieces(self, read: Read, row: int, block: Bytes) -> Iterator[tuple[int, Bytes | SharedBlock]]:
        """Yield each rank's piece of a block."""
        if read.axis is None:
            whole = SharedBlock(block.reshape(-1).data)
            for rank in read.ranks or range(len(self._sinks)):
                yield rank, whole
            return
        unit = block.shape[1] // read.shape[1] if read.axis == 1 else 0
        for rank, span in self._takers(read):
            if read.axis == 1:
                yield rank, block[:, span.begin * unit : span.end * unit]
                continue
            begin, end = max(span.begin - row, 0), min(span.end - row, len(block))
            if begin < end:
                yield rank, block[begin:end]

    def _takers(self, read: Read) -> Iterator[tuple[int, Span]]:
        """Yield the ranks that take a part of a cut read, with their spans."""
        return zip(read.ranks or range(len(self._sinks)), read.spans, strict=True)

    def _append(self, rank: int, piece: Bytes | SharedBlock) -> None:
        """Write a piece to a rank's sink, on the rank's thread."""
        sink = self._sinks[rank]
        if isinstance(piece, SharedBlock):
            if isinstance(sink, HashingWriter):
                sink.write_shared(piece)
            else:
                sink.write(piece.data)
            return
        if not piece.flags.c_contiguous:  # a cut of columns; the rank's last piece was written, so its buffer is free
            packed = self._packed[rank].of_size(piece.size).reshape(piece.shape)
            np.copyto(packed, piece)
            piece = packed
        sink.write(piece.reshape(-1).data)

    def _pad(self, read: Read, dtype: str) -> Iterator[Future[None]]:
        row_bytes = num_bytes(dtype, math.prod(read.shape[1:]))
        for rank, span in self._takers(read) if read.spans else ():
            if span.pad:
                yield self._writers[rank].submit(_write_zeros, self._sinks[rank], span.pad * row_bytes)


class _Buffer:
    """Reusable memory on a page boundary, so that sources and stores need no copy."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def of_size(self, size: int) -> Bytes:
        """Return the first `size` bytes of the memory, growing it if needed. Earlier content is lost."""
        if self._memory.size < size:
            self._memory = np.frombuffer(page_buffer(size), np.uint8)
        return self._memory[:size]


def _chunks(target: Target) -> Iterator[_Chunk]:
    """Yield the rows of a target's reads that any rank takes, in blocks; one empty chunk for a scale.

    A block of a quantized weight holds an even number of rows: some formats pack two rows into a byte.
    """
    if target.scale is not None:
        yield _Chunk(target, 0, 0, 0, True)
    for position, read in enumerate(target.reads):
        row_bytes = _rows(read)[1]
        first, last = _wanted_rows(read)
        if first >= last or row_bytes == 0:
            yield _Chunk(target, position, 0, 0, True)
            continue
        step = max(1, BLOCK_BYTES // row_bytes)
        unit = read.tensor.encoding.row_unit if read.tensor.encoding else 1
        step += step % 2 if target.quantized or unit == 2 else 0
        for row in range(first, last, step):
            yield _Chunk(target, position, row, min(row + step, last), row + step >= last)


def _rows(read: Read) -> tuple[int, int]:
    """Return the number of rows of what is read, along the first axis, and the bytes of one row."""
    tensor = read.tensor
    if read.rows is not None:
        return read.rows.count, num_bytes(tensor.dtype, math.prod(read.shape[1:]))
    rows = tensor.shape[0] if tensor.shape else 1
    return rows, tensor.num_bytes // rows if rows else 0


def _wanted_rows(read: Read) -> tuple[int, int]:
    """Return [first, last) of the rows that some rank takes; all rows unless axis 0 is cut."""
    if read.axis != 0:
        return 0, _rows(read)[0]
    taken = [span for span in read.spans if span.begin < span.end]
    return min((span.begin for span in taken), default=0), max((span.end for span in taken), default=0)


def _read_twice(reads: Iterable[Read]) -> set[str]:
    """Return the source tensors with rows that several reads want. They are held, so that no byte is read twice."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for read in reads:
        rows.setdefault(read.name, []).append(_wanted_rows(read))
    return {name for name, taken in rows.items() if any(one[1] > two[0] for one, two in itertools.pairwise(sorted(taken)))}


def _result(ahead: deque[tuple[_Chunk, Future[Bytes]]]) -> tuple[_Chunk, Bytes]:
    chunk, block = ahead.popleft()
    return chunk, block.result()


def _write_zeros(sink: Sink, left: int) -> None:
    zeros = memoryview(bytes(min(left, _ZERO_BYTES)))
    while left:
        count = min(left, len(zeros))
        sink.write(zeros[:count])
        left -= count


def _finish(jobs: list[Future[None]]) -> None:
    wait(jobs)
    for job in jobs:
        job.result()


_INFINITY_BITS: dict[str, tuple[str, str, int]] = {
    "BF16": ("i2", "u2", 0x7F80),
    "F16": ("i2", "u2", 0x7C00),
    "F32": ("i4", "u4", 0x7F800000),
}
"""Signed and unsigned integer types of a dtype's size, and the bits of its positive infinity."""


_STRETCH_BYTES = 256 * 2**10


def is_finite(block: Bytes, dtype: str) -> bool:
    """Whether a block holds no NaN and no infinity. Dtypes without a fast test pass.

    Seen as integers, non-finite values are the largest: among positive values as signed, among all as unsigned, because of the
    sign bit. Both maxima are taken over stretches that fit the core's cache, so memory is read once.
    """
    if dtype not in _INFINITY_BITS or not block.size:
        return True
    signed, unsigned, infinity = _INFINITY_BITS[dtype]
    flat = np.ascontiguousarray(block).reshape(-1)
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    for begin in range(0, flat.size, _STRETCH_BYTES):
        stretch = flat[begin : begin + _STRETCH_BYTES]
        if int(stretch.view(signed).max()) >= infinity or int(stretch.view(unsigned).max()) >= sign + infinity:
            return False
    return True


def cast(block: Bytes, tensor: TensorInfo, dtype: str, add: float = 0.0) -> Bytes:
    """Round a block of rows to another floating-point dtype, to nearest even, after adding `add` in float32.

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
