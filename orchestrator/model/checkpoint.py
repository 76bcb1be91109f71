"""What a source checkpoint holds, known from its headers alone."""

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
    """Relative to the checkpoint's folder."""
    num_bytes: int
    identity: str
    """Changes whenever the content may have changed; says nothing of the place. Readers define it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor, its elements in C order without gaps in one file."""

    file: int
    """Index into CheckpointIndex.files."""
    offset: int
    """First byte, from the start of the file."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Assembly:
    """How a tensor is put together, for formats that do not store it as one run of its elements."""

    pieces: tuple[Piece, ...]
    axis: int = 0
    """Along which the pieces are joined, 0 or 1."""
    paired_rows: int = 0
    """Rows of one attention head where the source stores the two halves of a head row by row in turn; 0: rows lie in order."""
    encoding: str = ""
    """The format's own name for the pieces' elements; empty: they are of the tensor's dtype."""
    add: float = 0.0
    """Added to every element, of a tensor in float32: takes off what another format stores added."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: where its bytes lie and what they mean."""

    name: str
    dtype: str
    """safetensors' name, e.g. BF16."""
    shape: tuple[int, ...]
    file: int
    """Index into CheckpointIndex.files."""
    offset: int
    """First byte, from the start of the file."""
    num_bytes: int
    assembly: Annotated[Assembly | None, Field(exclude_if=lambda value: value is None)] = None
    """None: one run of `num_bytes` at `offset`; then it is left out of options, whose digests stay those of old plans."""

    def files(self) -> set[int]:
        """Numbers of the files that hold its bytes."""
        return {self.file} if self.assembly is None else {piece.file for piece in self.assembly.pieces}

    def renumbered(self, position: Mapping[int, int]) -> TensorInfo:
        """The same tensor where file number n is called position[n]."""
        if self.assembly is None:
            return replace(self, file=position[self.file])
        pieces = tuple(replace(piece, file=position[piece.file]) for piece in self.assembly.pieces)
        return replace(self, file=pieces[0].file, assembly=replace(self.assembly, pieces=pieces))

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Every tensor of a checkpoint, and its config."""

    format: str
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    """The source's own config.json, undecoded."""
    warnings: tuple[str, ...] = ()
    """What a user should know of the source, e.g. a second set of weights that is passed over."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, headers excluded."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())
