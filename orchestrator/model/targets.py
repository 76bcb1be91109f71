"""What conversion writes: the tensors of a rank file, each with the source slices or the calibrated numbers it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.base.dtypes import num_bytes
from orchestrator.model.checkpoint import TensorInfo
from orchestrator.model.quantization import LinearFormat
from orchestrator.model.rules import Span


@dataclass(frozen=True, slots=True)
class Read:
    """A source tensor and what each tensor-parallel rank takes of it."""

    tensor: TensorInfo
    axis: int | None
    """The cut axis, 0 or 1; None: every rank takes all."""
    spans: tuple[Span, ...]
    """By rank; empty when axis is None."""
    ranks: tuple[int, ...] = ()
    """The tp_ranks that take something, if not all do (experts); spans are in this order."""
    add: float = 0.0
    """Added to every element, in float32, before rounding."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The weight of a quantized linear, or of all experts of a layer, one linear per read."""

    format: LinearFormat
    dtype: str
    """Of the model: elements are rounded to it before they are quantized."""
    modules: tuple[str, ...]
    """By read: the source module, whose quantities the calibration artifact holds."""
    amax_modules: tuple[tuple[str, ...], ...]
    """By read: the modules whose largest weight_amax is the scale's, because they are fused with it."""


@dataclass(frozen=True, slots=True)
class PackedScale:
    """Scales that fall out of packing the weight that stands before them."""

    weight: str
    """Name of its target."""


@dataclass(frozen=True, slots=True)
class ArtifactScale:
    """Quantities of the calibration artifact, one entry per expert where there are experts."""

    quantities: tuple[str, ...]
    """Of weight_amax, input_amax, pre_quant_scale, k_amax, v_amax."""
    entries: tuple[tuple[tuple[str, ...], ...], ...]
    """By rank and entry: modules; the largest of their quantities counts (all are equal for pre_quant_scale)."""
    divisor: float = 1.0
    spans: tuple[Span, ...] = ()
    """By rank: what it takes of a vector; empty: the whole."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of a rank file; all tensor-parallel ranks hold one of this name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Local to a rank."""
    reads: tuple[Read, ...] = ()
    quantized: QuantizedWeight | None = None
    """How the elements are quantized on their way; None: they keep the dtype's precision."""
    scale: PackedScale | ArtifactScale | None = None
    """What the tensor is made of when it is a scale and has no reads."""

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, math.prod(self.shape))
