"""Index of a source checkpoint, read from its headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.base.dtypes import num_bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of weights."""

    name: str
    """Path relative to the checkpoint's folder."""
    num_bytes: int
    identity: str
    """Text that changes whenever the content may have changed, whatever the location. Readers define it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor, in one file, in C order without gaps."""

    file: int
    """Index into CheckpointIndex.files."""
    offset: int
    """Offset of the first byte in the file."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Assembly:
    """Assembly of a tensor from pieces, for formats that do not store it as one run of its elements."""

    pieces: tuple[Piece, ...]
    axis: int = 0
    """Axis along which the pieces are joined, 0 or 1."""
    paired_rows: int = 0
    """Rows of an attention head whose two halves the source stores interleaved; 0: rows are in order."""
    encoding: str = ""
    """Name of the pieces' element type in the source format; empty: the tensor's dtype."""
    add: float = 0.0
    """Number added to every element of a float32 tensor. Undoes an addition that the source format stores."""
    transposed: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether pieces are stored as [columns, rows]. They are joined along the rows."""
    part: Annotated[tuple[int, int] | None, Field(exclude_if=lambda value: value is None)] = None
    """Rows [begin, end) of what the pieces make up that are the tensor; None: all."""
    factor: Annotated[float, Field(exclude_if=lambda value: value == 1)] = 1.0
    """Number that every stored element is multiplied with, in float32, before `add`. The tensor is float32 then."""
    divisor: Annotated[float, Field(exclude_if=lambda value: value == 1)] = 1.0
    """Number that every stored element is divided by, in float32, before `add`. The tensor is float32 then."""


@dataclass(frozen=True, slots=True)
class ChunkedArray:
    """An array that a source stores in chunks of equal shape, each compressed by itself. Layers may be one of its axes."""

    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    """Shape of every chunk. Those at the ends are padded to it."""
    codec: Literal["none", "zstd"]
    chunks: tuple[tuple[int, int, int], ...]
    """File (index into CheckpointIndex.files), offset of the first byte, and stored bytes of each chunk, in C order of the grid."""
    inline: Annotated[tuple[tuple[int, str, int, int], ...], Field(exclude_if=lambda value: not value)] = ()
    """Number, key, first byte and end of the chunks that lie within a value of a B-tree's node. Their range is the node's."""
    fixed: Annotated[tuple[tuple[int, int], ...], Field(exclude_if=lambda value: not value)] = ()
    """Axis and index of the part of the array that is the tensor."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the tensor's part, without the fixed axes."""
        fixed = dict(self.fixed)
        return tuple(size for axis, size in enumerate(self.shape) if axis not in fixed)

    @property
    def key(self) -> tuple[Any, ...]:
        """Identity of the array: the place of its first chunk."""
        return (self.shape, self.chunks[:1], self.inline[:1])

    @property
    def all_bytes(self) -> int:
        """Stored bytes of the array."""
        inline = {number: end - begin for number, _, begin, end in self.inline}
        return sum(inline.get(number, size) for number, (_, _, size) in enumerate(self.chunks))

    @property
    def stored_bytes(self) -> int:
        """Stored bytes of the array, shared out among its parts."""
        return self.all_bytes // max(1, math.prod(self.shape[axis] for axis, _ in self.fixed))

    def renumbered(self, position: Mapping[int, int]) -> ChunkedArray:
        """Return the same array with every file index n replaced by position[n]."""
        return replace(self, chunks=tuple((position[file], offset, size) for file, offset, size in self.chunks))


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file of a quantized checkpoint holds it: codes, scales, zero points."""

    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]
    file: int
    """Index into CheckpointIndex.files."""
    offset: int
    """Offset of the first byte in the file."""

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, math.prod(self.shape))


class Packing(StrEnum):
    """Layout of the codes of a weight [out, in]."""

    BYTES = "bytes"
    """[out, in], a code per byte; a row may end in padding."""
    NIBBLES = "nibbles"
    """[out, in / 2], two codes per byte, the low one first; a row may end in padding."""
    ROW_PAIRS = "row_pairs"
    """[out / 2, in], two rows per byte, the even one low."""
    COLUMN_WORDS = "column_words"
    """int32 [in / n, out]: n input features per word, the lowest first (GPTQ)."""
    ROW_WORDS = "row_words"
    """int32 [in, out / 8]: rows 0, 2, 4, 6, 1, 3, 5, 7 of eight per word, from the lowest bits (AWQ's gemm)."""
    EXPERTS = "experts"
    """NIBBLES of every expert, [experts, out, ...], of a tensor that is [experts, in, out] (gpt-oss)."""


class View(StrEnum):
    """View of a quantized weight that a tensor of the index gives, where it does not give the dequantized weight."""

    VALUES = "values"
    ROW_PAIRS = "row_pairs"
    """INT4 codes in two's complement, two rows per byte: int8 [out / 2, in]."""
    ROW_SCALES = "row_scales"
    """The scale of the tensor, once per row: float32 [out]."""
    E4M3_SCALES = "e4m3_scales"
    """Power-of-two scales per 32 as E4M3 per 16, divided by E4M3_SECOND."""
    E4M3_SECOND = "e4m3_second"
    """Power of two by which the largest of the peers' scales is 256, the largest power of two of E4M3."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Quantized storage of a weight. An element is (code - zero) * scale, in float32, rounded once.

    `checkpoints.quantized.decoding` computes it.
    """

    packing: Packing
    number: Literal["E4M3", "E2M1", "S8", "S4", "U8", "U4"]
    """Meaning of a code: floating-point, signed (two's complement), or unsigned."""
    codes: Stored
    scale: Stored
    block: tuple[int, int]
    """Rows and columns of [out, in] that share a scale and a zero point. U8 and F8_E8M0 scales are exponents: 2 ** (s - 127)."""
    zero: Annotated[Stored | None, Field(exclude_if=lambda value: value is None)] = None
    """Zero points, packed as the format packs them; None: `offset`."""
    offset: Annotated[int, Field(exclude_if=lambda value: value == 0)] = 0
    """Number that is subtracted from every code, or added to every stored zero point."""
    second: Annotated[Stored | None, Field(exclude_if=lambda value: value is None)] = None
    """Scale of the scales, one number."""
    divides: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether `second` divides the scales instead of multiplying them."""
    groups: Annotated[Stored | None, Field(exclude_if=lambda value: value is None)] = None
    """int32 [in]: group of each input feature (GPTQ's g_idx); None: consecutive blocks."""
    columns: Annotated[Stored | None, Field(exclude_if=lambda value: value is None)] = None
    """Factor of each input feature, float [in] (AWQ's and SmoothQuant's pre_quant_scale)."""
    input_scale: Annotated[Stored | None, Field(exclude_if=lambda value: value is None)] = None
    """Calibrated scale of the linear's input. No part of the weight."""
    view: Annotated[View, Field(exclude_if=lambda value: value == View.VALUES)] = View.VALUES
    peers: Annotated[tuple[Stored, ...], Field(exclude_if=lambda value: not value)] = ()
    """Scales of the weights that are joined with this one, its own included. They share E4M3_SECOND."""

    def parts(self) -> Iterator[Stored]:
        """Yield the stored tensors that the elements depend on."""
        found: tuple[Stored | None, ...]
        match self.view:
            case View.VALUES:
                found = (self.codes, self.scale, self.zero, self.second, self.groups, self.columns)
            case View.ROW_PAIRS:
                found = (self.codes,)
            case View.ROW_SCALES | View.E4M3_SCALES:
                found = (self.scale,)
            case View.E4M3_SECOND:  # the scales were read with E4M3_SCALES
                found = ()
        return (part for part in found if part is not None)

    @property
    def is_transposed(self) -> bool:
        """Whether rows of the weight are columns of the codes, so that any row needs all of the codes."""
        return self.packing in (Packing.COLUMN_WORDS, Packing.ROW_WORDS)

    @property
    def row_unit(self) -> int:
        """Rows that are stored together, and so are read together."""
        return 2 if self.packing is Packing.ROW_PAIRS else 1

    def renumbered(self, position: Mapping[int, int]) -> Encoding:
        """Return the same encoding with every file index n replaced by position[n], and without the scale of the input."""

        def moved(part: Stored | None) -> Stored | None:
            # A view reads some of the parts. The files of the others need not be among the renumbered.
            return None if part is None else Stored(part.dtype, part.shape, position.get(part.file, 0), part.offset)

        codes, scale, zero, second, groups, columns = map(
            moved, (self.codes, self.scale, self.zero, self.second, self.groups, self.columns)
        )
        assert codes is not None
        assert scale is not None
        peers = tuple(part for part in map(moved, self.peers) if part is not None)
        return Encoding(
            self.packing, self.number, codes, scale, self.block, zero, self.offset, second, self.divides, groups, columns,
            None, self.view, peers,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One source tensor: dtype, shape and location."""

    name: str
    dtype: str
    """safetensors' name, e.g. BF16."""
    shape: tuple[int, ...]
    file: int
    """Index into CheckpointIndex.files."""
    offset: int
    """Offset of the first byte in the file."""
    num_bytes: int
    assembly: Annotated[Assembly | None, Field(exclude_if=lambda value: value is None)] = None
    """Assembly from pieces; None: one run of `num_bytes` at `offset`. None is not serialized, which keeps digests of old plans."""
    encoding: Annotated[Encoding | None, Field(exclude_if=lambda value: value is None)] = None
    """Quantized storage; None: the elements are stored as they are. `dtype` is the one that they are dequantized to."""
    array: Annotated[ChunkedArray | None, Field(exclude_if=lambda value: value is None)] = None
    """Chunked storage. `assembly` then describes the elements of the array's part, in its order, as file 0."""

    @property
    def stored_bytes(self) -> int:
        """Number of the source's bytes that hold the tensor."""
        if self.array is not None:
            return self.array.stored_bytes
        return self.num_bytes if self.encoding is None else sum(part.num_bytes for part in self.encoding.parts())

    @property
    def stored_dtype(self) -> str:
        """Dtype of what is stored, also of a tensor that is computed from it in float32."""
        return self.dtype if self.array is None else self.array.dtype

    @property
    def is_transposed(self) -> bool:
        """Whether rows of the tensor are columns of what is stored."""
        return self.assembly is not None and self.assembly.transposed

    def files(self) -> set[int]:
        """Return the indices of the files that hold the tensor."""
        if self.encoding is not None:
            return {part.file for part in (*self.encoding.parts(), *self.encoding.peers)}
        if self.array is not None:
            return {file for file, _, _ in self.array.chunks}
        return {self.file} if self.assembly is None else {piece.file for piece in self.assembly.pieces}

    def renumbered(self, position: Mapping[int, int]) -> TensorInfo:
        """Return the same tensor with every file index n replaced by position[n]."""
        if self.encoding is not None:
            return replace(self, file=position.get(self.file, 0), encoding=self.encoding.renumbered(position))
        if self.array is not None:
            return replace(self, file=position[self.file], array=self.array.renumbered(position))
        if self.assembly is None:
            return replace(self, file=position[self.file])
        pieces = tuple(replace(piece, file=position[piece.file]) for piece in self.assembly.pieces)
        return replace(self, file=pieces[0].file, assembly=replace(self.assembly, pieces=pieces))

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Tensors, files and config of a checkpoint."""

    format: str
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the source, undecoded."""
    warnings: tuple[str, ...] = ()
    """Warnings for the user, e.g. of a second set of weights that is not read."""

    left_out: Mapping[str, str] = field(default_factory=dict)
    """Stored tensors of a quantized source that hold no weight -> reason why they are not read."""
    activation_limit: float | None = None
    """Bound of activations that a source with a scale per row names (FBGEMM)."""
    part_of: str = ""
    """Architecture of the larger model whose language model this is; empty: the checkpoint is of nothing more."""
    algorithm: str = ""
    """Name of the format in which a quantized source stores its weights; empty: not quantized."""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors as stored, without headers."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    def dequantized_to(self, dtype: str) -> CheckpointIndex:
        """Return the index with quantized tensors dequantized to `dtype` (safetensors' name) instead of the source's dtype.

        So they are rounded once, to the build's dtype.
        """
        tensors = {
            name: tensor
            if tensor.encoding is None or tensor.dtype == dtype
            else replace(tensor, dtype=dtype, num_bytes=num_bytes(dtype, tensor.num_elements))
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)
