"""Chunks of a distributed checkpoint as pieces of the tensors that are cut from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from orchestrator.base.dtypes import MODEL_DTYPES, num_bytes
from orchestrator.base.errors import SourceCorruptError, SourceMissingError
from orchestrator.checkpoints.torch_dist import Chunk, StoredTensor
from orchestrator.checkpoints.torch_zip import TensorArchives
from orchestrator.model.checkpoint import Piece
from orchestrator.stores.source import SourceFolder

_HEADER_THREADS = 16

Rows = tuple[tuple[int, int], ...]


class Blocks:
    """The located chunks of a checkpoint."""

    def __init__(self, folder: SourceFolder, weights: str, tensors: Iterable[StoredTensor], names: list[str]) -> None:
        """Read the heads of the chunks of `tensors`, whose files stand in the subfolder `weights`.

        Raises SourceMissingError for a missing file, SourceCorruptError for a truncated one or a chunk of another shape or dtype.
        """
        wanted = [(tensor, chunk) for tensor in tensors for chunk in tensor.chunks]
        self.files = sorted({weights + chunk.file for _, chunk in wanted})
        """Names of the files that hold the chunks."""
        for name in self.files:
            if name not in names:
                raise SourceMissingError(f"{folder.url}/{weights}.metadata names {name.removeprefix(weights)}, which is missing")
        sizes = {name: folder.source_file(name).num_bytes for name in self.files}
        numbers = {name: number for number, name in enumerate(self.files)}

        archives = TensorArchives(folder)

        def locate(member: tuple[StoredTensor, Chunk]) -> tuple[int, int]:
            tensor, chunk = member
            name = weights + chunk.file
            if chunk.offset + chunk.num_bytes > sizes[name]:
                raise SourceCorruptError(
                    f"{folder.url}/{name} is truncated: {sizes[name]} bytes, {tensor.name} ends at {chunk.offset + chunk.num_bytes}"
                )
            entry = archives.read(name, chunk.offset, chunk.num_bytes)
            if entry.dtype != MODEL_DTYPES[tensor.dtype] or _without_ones(entry.shape) != _without_ones(chunk.sizes):
                raise SourceCorruptError(
                    f"{folder.url}/{name}: the chunk of {tensor.name} at byte {chunk.offset} is {entry.dtype} {list(entry.shape)}, "
                    f".metadata says {tensor.dtype} {list(chunk.sizes)}"
                )
            return numbers[name], entry.offset

        self._blocks: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            self._places = dict(zip(((t.name, c.offsets) for t, c in wanted), pool.map(locate, wanted), strict=True))

    def pieces(self, tensor: StoredTensor, place: tuple[int, ...], rows: Rows, where: str) -> tuple[tuple[Piece, ...], int]:
        """Return the pieces of `rows` of a tensor's block at `place` on its first axes, and the axis along which they are joined.

        Raises SourceCorruptError for chunks that leave gaps, overlap, or cut both axes of the block.
        """
        chunks = self._chunks_of(tensor, len(place)).get(place, [])
        block = tensor.shape[len(place) :]
        if all(chunk.sizes[len(place) + 1 :] == block[1:] for chunk in chunks):
            axis, pieces = 0, [piece for begin, end in rows for piece in self._rows(tensor, chunks, place, begin, end)]
            complete = sum(piece.shape[0] for piece in pieces) == sum(end - begin for begin, end in rows)
        else:
            axis, pieces = 1, [piece for chunk in chunks for piece in self._rows(tensor, [chunk], place, *rows[0])]
            whole = len(rows) == 1 and all(piece.shape[0] == rows[0][1] - rows[0][0] for piece in pieces)
            complete = whole and sum(piece.shape[1] for piece in pieces) == block[1] and _adjacent(chunks, len(place) + 1)
        if not complete:
            raise SourceCorruptError(
                f"{where}: the chunks of {tensor.name} cut it as no trainer does", "Save the checkpoint again."
            )
        return tuple(pieces), axis

    def _chunks_of(self, tensor: StoredTensor, num_axes: int) -> dict[tuple[int, ...], list[Chunk]]:
        """Return the chunks of each block of a tensor, in order: index on the first `num_axes` axes -> chunks."""
        if (tensor.name, num_axes) not in self._blocks:
            found: dict[tuple[int, ...], list[Chunk]] = {}
            for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.offsets):
                ranges = (range(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes[:num_axes], strict=False))
                for place in itertools.product(*ranges):
                    found.setdefault(place, []).append(chunk)
            self._blocks[tensor.name, num_axes] = found
        return self._blocks[tensor.name, num_axes]

    def _rows(self, tensor: StoredTensor, chunks: Iterable[Chunk], place: tuple[int, ...], begin: int, end: int) -> Iterable[Piece]:
        """Yield rows [begin, end) of a block from chunks with all of its columns, in order."""
        for chunk in chunks:
            first, inner = chunk.offsets[len(place)], chunk.sizes[len(place) :]
            low, high = max(begin, first), min(end, first + inner[0])
            if low < high:
                file, offset = self._places[tensor.name, chunk.offsets]
                before = _position(chunk, place) * math.prod(inner) + (low - first) * math.prod(inner[1:])
                offset += num_bytes(MODEL_DTYPES[tensor.dtype], before)
                yield Piece(file, offset, (high - low, *inner[1:]))
                begin = high


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without its first axes of one element: writers before Megatron-Core 0.14 drop or add them."""
    while shape[1:] and shape[0] == 1:
        shape = shape[1:]
    return shape


def _position(chunk: Chunk, place: tuple[int, ...]) -> int:
    """Return the number of whole blocks that stand before the one at `place` in the chunk."""
    position = 0
    for at, first, size in zip(place, chunk.offsets, chunk.sizes, strict=False):
        position = position * size + at - first
    return position


def _adjacent(chunks: Iterable[Chunk], axis: int) -> bool:
    """Whether each chunk begins on `axis` where the one before ends."""
    at = 0
    for chunk in chunks:
        if chunk.offsets[axis] != at:
            return False
        at += chunk.sizes[axis]
    return True
