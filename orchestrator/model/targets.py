"""Targets of conversion: the tensors of a rank file, each with its source slices or calibrated quantities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from orchestrator.base.dtypes import num_bytes
from orchestrator.model.checkpoint import TensorInfo
from orchestrator.model.quantization import LinearFormat
from orchestrator.model.rules import Span


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Rows of one expert in a tensor of all experts, [experts, out, in], [experts, in, out] or [experts, out]."""

    expert: int
    first: int
    step: int
    count: int
    """Number of rows: every `step`-th from `first` on, along the output features."""
    transposed: bool = False
    """Whether an expert is stored as [in, out]."""


@dataclass(frozen=True, slots=True)
class Read:
    """A source tensor, or an expert's part of one, and the span of it that each tensor-parallel rank takes."""

    tensor: TensorInfo
    axis: int | None
    """Cut axis, 0 or 1; None: every rank takes the whole tensor."""
    spans: tuple[Span, ...]
    """Span of each rank; empty when axis is None."""
    ranks: tuple[int, ...] = ()
    """tp_ranks that take a span, in the order of `spans` (experts); empty: all ranks."""
    add: float = 0.0
    """Number added to every element, in float32, before rounding."""
    rows: Annotated[ExpertRows | None, Field(exclude_if=lambda value: value is None)] = None
    """The expert's part of the tensor; None: the tensor. None is not serialized, which keeps digests of old plans."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is cut: that of the tensor, or of an expert's part, with the output features first."""
        if self.rows is None:
            return self.tensor.shape
        inner = self.tensor.shape[1:]
        return (self.rows.count, *(inner[:-1] if self.rows.transposed else inner[1:]))

    @property
    def name(self) -> str:
        """Name of what is read at once: the tensor, or an expert in it."""
        return self.tensor.name if self.rows is None else f"{self.tensor.name}.{self.rows.expert}"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Weight of a quantized linear, or of all experts of a layer, one linear per read."""

    format: LinearFormat
    dtype: str
    """Model dtype, safetensors' name. Elements are rounded to it before they are quantized."""
    modules: tuple[str, ...]
    """Source module of each read, a key of the calibration artifact."""
    amax_modules: tuple[tuple[str, ...], ...]
    """Modules that are fused with each read, its own included. The largest weight_amax among them determines the scale."""


@dataclass(frozen=True, slots=True)
class PackedScale:
    """Scales that are computed while the preceding weight is packed."""

    weight: str
    """Name of the weight's target."""


@dataclass(frozen=True, slots=True)
class ArtifactScale:
    """Scale from quantities of the calibration artifact, with one entry per expert where there are experts."""

    quantities: tuple[str, ...]
    """Names among weight_amax, input_amax, pre_quant_scale, k_amax, v_amax."""
    entries: tuple[tuple[tuple[str, ...], ...], ...]
    """Modules of each rank and entry. The largest of their quantities is used (all are equal for pre_quant_scale)."""
    divisor: float = 1.0
    spans: tuple[Span, ...] = ()
    """Span of each rank on a vector; empty: every rank takes the whole vector."""


@dataclass(frozen=True, slots=True)
class StoredScale:
    """Scale that the source stores as a number of each joined weight, with one entry per expert where there are experts."""

    entries: tuple[tuple[tuple[TensorInfo, ...], ...], ...]
    """Stored numbers of each rank and entry. The largest is used."""
    must_agree: bool
    """Whether the numbers of an entry must be equal: joined weights share one scale."""
    divides: bool = False
    """Whether the scale is the number's inverse."""

    def tensors(self) -> Iterator[TensorInfo]:
        """Yield the stored numbers of all ranks."""
        return (tensor for rank in self.entries for entry in rank for tensor in entry)


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of a rank file. All tensor-parallel ranks hold a tensor of this name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Shape on one rank."""
    reads: tuple[Read, ...] = ()
    quantized: QuantizedWeight | None = None
    """Quantization of the elements; None: not quantized."""
    scale: PackedScale | ArtifactScale | StoredScale | None = None
    """Source of a scale, which has no reads; None: not a scale."""

    def tensors(self) -> Iterator[TensorInfo]:
        """Yield the source tensors that are read for the target."""
        yield from (read.tensor for read in self.reads)
        if isinstance(self.scale, StoredScale):
            yield from self.scale.tensors()

    def renumbered(self, position: Mapping[int, int]) -> Target:
        """Return the same target with every file index n replaced by position[n]."""
        reads = tuple(replace(read, tensor=read.tensor.renumbered(position)) for read in self.reads)
        if not isinstance(self.scale, StoredScale):
            return replace(self, reads=reads)
        moved = {tensor: tensor.renumbered(position) for tensor in self.scale.tensors()}
        entries = tuple(tuple(tuple(moved[one] for one in entry) for entry in rank) for rank in self.scale.entries)
        return replace(self, reads=reads, scale=replace(self.scale, entries=entries))

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, math.prod(self.shape))
