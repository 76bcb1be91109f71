"""Index of a source checkpoint, read from its headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field


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

    def files(self) -> set[int]:
        """Return the indices of the files that hold the tensor."""
        return {self.file} if self.assembly is None else {piece.file for piece in self.assembly.pieces}

    def renumbered(self, position: Mapping[int, int]) -> TensorInfo:
        """Return the same tensor with every file index n replaced by position[n]."""
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

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, without headers."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())
