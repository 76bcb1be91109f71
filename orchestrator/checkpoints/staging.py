"""Parts of chunked arrays, decompressed once into files without a name, from where rows are read as from any source.

A chunk of a checkpoint of JAX often spans all layers, so a layer cannot be read without the others. The first part of an array that
is wanted stages those that will be wanted next, as many as STAGED_BYTES hold. Chunks are decompressed as streams: memory is a few
blocks, whatever the size of a chunk.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import ITEM_BITS, num_bytes, numpy_dtype
from orchestrator.base.errors import SourceCorruptError, abbreviated
from orchestrator.checkpoints.assembly import read_assembled_rows
from orchestrator.checkpoints.ocdbt import inline_value
from orchestrator.model.checkpoint import Assembly, ChunkedArray, TensorInfo
from orchestrator.stores.source import ByteSource

STAGED_BYTES = 4 * 2**30
"""Most bytes of an array's parts that are staged at once."""
_READ_BYTES = 4 * 2**20
_SLAB_BYTES = 8 * 2**20
_Fixed = tuple[tuple[int, int], ...]
_Bits = npt.NDArray[np.unsignedinteger[Any]]


class Staging:
    """Reads rows of tensors that are parts of chunked arrays. Threads may call it at once; they wait for each other."""

    def __init__(self, source: ByteSource, ahead: Iterable[TensorInfo] = (), folder: Path | None = None) -> None:
        """`ahead`: tensors that will be read, in their order. `folder`: for the files; None: the system's for temporary files."""
        self._source, self._folder = source, folder
        self._ahead: dict[tuple[Any, ...], list[_Fixed]] = {}
        for tensor in ahead:
            if tensor.array is not None:
                self._ahead.setdefault(tensor.array.key, []).append(tensor.array.fixed)
        self._staged: dict[tuple[Any, ...], _StagedParts] = {}
        self._node: tuple[tuple[int, int, int], bytes] = ((0, 0, 0), b"")  # the latest B-tree node, which holds several chunks
        self._lock = threading.Lock()

    def read(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        """Fill `out` with rows [begin, end). Raises SourceCorruptError."""
        array = tensor.array
        assert array is not None
        with self._lock:
            key = array.key
            staged = self._staged.get(key)
            if staged is None or array.fixed not in staged.offsets:
                staged = self._stage(array, self._next_parts(key, array), staged)
                self._staged[key] = staged
            part = _Part(staged.file, staged.offsets[array.fixed])
            assembly = tensor.assembly
            if assembly is None or (assembly.factor, assembly.divisor, assembly.add) == (1.0, 1.0, 0.0):
                read_assembled_rows(part, replace(tensor, array=None), begin, end, out)
            else:
                _read_computed(part, tensor, array, assembly, begin, end, out)

    def _next_parts(self, key: tuple[Any, ...], array: ChunkedArray) -> list[_Fixed]:
        """Return the part that is wanted and those that follow it, within STAGED_BYTES."""
        known = list(dict.fromkeys(self._ahead.get(key, ())))
        first = known.index(array.fixed) if array.fixed in known else len(known)
        room = max(1, STAGED_BYTES // max(1, _part_bytes(array)))
        return (known[first:] or [array.fixed])[:room]

    def _stage(self, array: ChunkedArray, parts: Sequence[_Fixed], old: _StagedParts | None) -> _StagedParts:
        """Decompress every chunk, and write its shares of `parts`. The old file of the array is used again."""
        file = old.file if old is not None else self._new_file()
        size = _part_bytes(array)
        os.ftruncate(file, 0)
        os.ftruncate(file, size * len(parts))
        staged = _StagedParts(file, {fixed: number * size for number, fixed in enumerate(parts)})
        grid = itertools.product(*(range(-(-n // step)) for n, step in zip(array.shape, array.chunk_shape, strict=True)))
        for number, position in enumerate(grid):
            start = tuple(place * step for place, step in zip(position, array.chunk_shape, strict=True))
            if any(_overlaps(array, start, fixed) for fixed in parts):
                self._stage_chunk(array, number, start, staged)
        return staged

    def _new_file(self) -> int:
        """Return the descriptor of a file without a name. It is closed with this object."""
        descriptor, name = tempfile.mkstemp(dir=self._folder, prefix="staged-")
        weakref.finalize(self, os.close, descriptor)
        Path(name).unlink()
        return descriptor

    def _stage_chunk(self, array: ChunkedArray, number: int, start: tuple[int, ...], staged: _StagedParts) -> None:
        stream = _Stream(self._raw(array, number), array, number)
        for first, slab in _slabs(stream, array):
            low = tuple(a + b for a, b in zip(start, first, strict=True))
            for fixed, offset in staged.offsets.items():
                _write_share(staged.file, offset, array, fixed, low, slab)
        stream.check_end()

    def _raw(self, array: ChunkedArray, number: int) -> _Raw:
        """Return the stored bytes of a chunk."""
        place = array.chunks[number]
        held = next((entry for entry in array.inline if entry[0] == number), None)
        if held is None:
            return _Raw(self._source, *place)
        if self._node[0] != place:
            self._node = place, _Raw(self._source, *place).read()
        return _Held(inline_value(self._node[1], held[1], _where(array, number))[held[2] : held[3]])


@dataclass(frozen=True)
class _StagedParts:
    """File with parts of an array, each in C order."""

    file: int
    """Descriptor."""
    offsets: dict[_Fixed, int]


class _Part:
    """A staged part, as a source with one file."""

    bytes_read = 0

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor, self._offset = descriptor, offset

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], self._offset + offset + done)
            if count == 0:
                raise SourceCorruptError("a staged array ended early: the scratch folder was changed during the build")
            done += count


def _part_bytes(array: ChunkedArray) -> int:
    return num_bytes(array.dtype, math.prod(array.part_shape))


def _overlaps(array: ChunkedArray, start: tuple[int, ...], fixed: _Fixed) -> bool:
    return all(start[axis] <= index < start[axis] + array.chunk_shape[axis] for axis, index in fixed)


def _slabs(stream: _Stream, array: ChunkedArray) -> Iterator[tuple[tuple[int, ...], _Bits]]:
    """Yield a chunk in slabs of a few megabytes: position of the first element in the chunk, elements with all axes."""
    shape, itemsize = array.chunk_shape, ITEM_BITS[array.dtype] // 8
    axis = 0  # the first axis of which one index fits a slab
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) * itemsize > _SLAB_BYTES:
        axis += 1
    inner = shape[axis + 1 :]
    step = max(1, _SLAB_BYTES // max(1, math.prod(inner) * itemsize))
    buffer = np.empty(min(step, shape[axis] if shape else 1) * math.prod(inner), f"u{itemsize}")
    for outer in itertools.product(*map(range, shape[:axis])):
        for begin in range(0, shape[axis] if shape else 1, step):
            count = min(step, shape[axis] - begin) if shape else 1
            data = buffer[: count * math.prod(inner)]
            stream.read_into(data.view(np.uint8).data)
            if not shape:
                yield (), data.reshape(())
                continue
            yield (*outer, begin, *(0 for _ in inner)), data.reshape((1,) * axis + (count, *inner))


def _write_share(descriptor: int, offset: int, array: ChunkedArray, fixed: _Fixed, low: tuple[int, ...], slab: _Bits) -> None:
    """Write what a slab, whose first element is at `low` in the array, holds of a part."""
    chosen = dict(fixed)
    take: list[Any] = []
    place: list[int] = []
    for axis, size in enumerate(slab.shape):
        if axis in chosen:
            index = chosen[axis] - low[axis]
            if not 0 <= index < size:
                return
            take.append(index)
        else:
            take.append(slice(0, max(0, min(size, array.shape[axis] - low[axis]))))  # without the padding at the end
            place.append(low[axis])
    share = np.ascontiguousarray(slab[tuple(take)])
    if share.size:
        _write_block(descriptor, offset, array.part_shape, place, share)


def _write_block(descriptor: int, offset: int, shape: tuple[int, ...], place: Sequence[int], block: _Bits) -> None:
    """Write a block into an array of a file, in runs that are as long as its axes are whole."""
    axis = len(shape)  # axes from here on are whole
    while axis > 0 and block.shape[axis - 1] == shape[axis - 1]:
        axis -= 1
    lead = max(0, axis - 1)
    strides = [math.prod(shape[number + 1 :]) * block.itemsize for number in range(len(shape))]
    base = offset + sum(at * stride for at, stride in zip(place, strides, strict=True))
    for position in np.ndindex(*block.shape[:lead]):
        run: memoryview = block[position].reshape(-1).view(np.uint8).data
        at = base + sum(number * stride for number, stride in zip(position, strides, strict=False))
        while run:
            written = os.pwrite(descriptor, run, at)
            run, at = run[written:], at + written


def _where(array: ChunkedArray, number: int) -> str:
    return f"chunk {number} of an array {list(array.shape)} in file {array.chunks[number][0]}"


class _Stream:
    """The decompressed bytes of a chunk, from front to back."""

    def __init__(self, raw: _Raw, array: ChunkedArray, number: int) -> None:
        self._raw, self._where = raw, _where(array, number)
        self._decoder: Any = None
        if array.codec == "zstd":
            import zstandard

            self._decoder = zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", self._raw), read_size=_READ_BYTES)

    def read_into(self, out: memoryview) -> None:
        """Fill `out` with the next bytes. Raises SourceCorruptError."""
        done = 0
        while done < len(out):
            count = self._some(out[done:])
            if not count:
                raise SourceCorruptError(f"{self._where} ends early: the checkpoint is damaged", "Copy it again.")
            done += count

    def check_end(self) -> None:
        """Check that nothing is left. Raises SourceCorruptError."""
        if self._some(memoryview(bytearray(1))):
            raise SourceCorruptError(f"{self._where} is longer than its shape: the checkpoint is damaged", "Copy it again.")

    def _some(self, out: memoryview) -> int:
        if self._decoder is None:
            return self._raw.readinto(out)
        import zstandard

        try:
            return int(self._decoder.readinto(out))
        except zstandard.ZstdError as error:
            raise SourceCorruptError(
                f"{self._where} is damaged: {abbreviated(str(error), 100)}", "Copy the checkpoint again."
            ) from None


class _Raw:
    """A range of a file, read from front to back."""

    def __init__(self, source: ByteSource, file: int, offset: int, left: int) -> None:
        self._source, self._file, self._offset, self._left = source, file, offset, left

    def readinto(self, out: memoryview) -> int:
        count = min(len(out), self._left)
        if count:
            self._source.read_into(self._file, self._offset, out[:count])
        self._offset, self._left = self._offset + count, self._left - count
        return count

    def read(self, size: int = -1) -> bytes:
        data = bytearray(self._left if size < 0 else min(size, self._left))
        self.readinto(memoryview(data))
        return bytes(data)


class _Held(_Raw):
    """A range that was read already."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def readinto(self, out: memoryview) -> int:
        part = self._data[self._at : self._at + len(out)]
        out[: len(part)] = part
        self._at += len(part)
        return len(part)

    def read(self, size: int = -1) -> bytes:
        part = self._data[self._at :] if size < 0 else self._data[self._at : self._at + size]
        self._at += len(part)
        return part


def _read_computed(
    part: ByteSource, tensor: TensorInfo, array: ChunkedArray, assembly: Assembly, begin: int, end: int, out: memoryview
) -> None:
    """Read rows of a float32 tensor that is computed from what is stored, by blocks."""
    columns = math.prod(tensor.shape[1:])
    plain = replace(assembly, factor=1.0, divisor=1.0, add=0.0)
    stored = replace(tensor, array=None, dtype=array.dtype, num_bytes=num_bytes(array.dtype, tensor.num_elements), assembly=plain)
    values = np.frombuffer(out, np.float32, (end - begin) * columns).reshape(end - begin, columns)
    step = max(assembly.paired_rows, 1) * max(1, 4 * _SLAB_BYTES // max(1, columns * 4 * max(assembly.paired_rows, 1)))
    for row in range(begin, end, step):
        last = min(row + step, end)
        block = np.empty((last - row) * columns, numpy_dtype(array.dtype))
        read_assembled_rows(part, stored, row, last, block.view(np.uint8).data)
        block_values = values[row - begin : last - begin]
        block_values[...] = block.reshape(last - row, columns)
        block_values *= np.float32(assembly.factor)
        block_values /= np.float32(assembly.divisor)
        block_values += np.float32(assembly.add)
