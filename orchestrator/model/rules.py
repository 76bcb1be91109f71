"""Rules by which a family's source tensors become rank tensors. Data only: frozen, evaluated on shapes alone.

Each part is cut first; then a rank's slices are joined along the first axis. So a rank reads byte ranges of the source, and
key/value heads that several ranks hold need no rule.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.base.errors import TopologyError
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_table import ConfigTable as ConfigTable  # re-exported to families
from orchestrator.model.topology import Topology


class Unit(Enum):
    """Unit that is never divided when an axis is cut."""

    ELEMENT = "element"
    HEAD = "head"
    KV_HEAD = "kv_head"
    """Key/value head. Several ranks hold the same head when there are more ranks than heads."""
    EXPERT_ELEMENT = "expert_element"
    """Element of an expert, whose axis is cut over the moe_tp ranks that share it."""
    VOCAB = "vocab"
    """Vocabulary row. The axis is padded with zero rows to a multiple of the number of ranks."""


class Where(Enum):
    """Pipeline stages that hold a rule's target."""

    EVERY_LAYER = "layer"
    FIRST_STAGE = "first"
    LAST_STAGE = "last"


class Layers(Enum):
    """Layers that hold the target of a rule of layers."""

    ALL = "all"
    DENSE = "dense"
    """Layers with a dense MLP: all of a model without experts."""
    EXPERTS = "experts"
    VALUES = "values"
    """Layers that project values."""
    NO_VALUES = "no_values"
    """Layers that take the keys as values."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Axis to split over the tensor-parallel ranks, and its unit."""

    axis: int
    unit: Unit


COLUMN = Cut(0, Unit.ELEMENT)
"""Column parallel: the output features, axis 0 of [out, in]."""
ROW = Cut(1, Unit.ELEMENT)
"""Row parallel: the input features, axis 1 of [out, in]."""
HEADS = Cut(0, Unit.HEAD)
KV_HEADS = Cut(0, Unit.KV_HEAD)
HEADS_IN = Cut(1, Unit.HEAD)
"""Row parallel by attention heads (the output projection)."""
EXPERT_COLUMN = Cut(0, Unit.EXPERT_ELEMENT)
EXPERT_ROW = Cut(1, Unit.EXPERT_ELEMENT)
VOCAB = Cut(0, Unit.VOCAB)


@dataclass(frozen=True, slots=True)
class Fusion:
    """Place of a part in a source tensor that holds all experts, [experts, ...]."""

    index: int = 0
    """Index of the part among `count` that are fused along the output features."""
    count: int = 1
    interleaved: bool = False
    """Whether the parts' rows alternate, instead of lying one part after the other."""
    transposed: bool = False
    """Whether an expert is stored as [in, out]."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source tensor of a target."""

    source: str
    """Name of the source tensor. May hold {layer}, the global layer number, and {expert}."""
    shape: tuple[str, ...]
    """Shape as names of ModelConfig.dims(), checked against the header."""
    cut: Cut | None = None
    """Cut over the ranks; None: every rank holds the whole part."""
    sections: tuple[str, ...] = ()
    """Names of dims() whose sections are fused along axis 0 of the source tensor (Phi-3); empty: the part is the whole tensor."""
    section: int = 0
    """Index of this part among the sections."""
    add: float = 0.0
    """Number added to every element, in float32, before rounding (Gemma's norms are stored as weight + 1)."""
    has_first_axis: bool = False
    """Whether the source tensor has a first axis of one element, which the target has not."""
    fusion: Fusion | None = None
    """Place in a source tensor of all experts, whose name then has no {expert}; None: the source has one for each expert."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One target tensor and its parts, which are joined along axis 0."""

    target: str
    """Name of the target. May hold {layer}, the layer's number within its pipeline stage."""
    parts: tuple[Part, ...]
    where: Where = Where.EVERY_LAYER
    when: Mapping[str, Any] = field(default_factory=dict)
    """Condition of the rule: fields of ModelConfig (`ModelConfig.setting`) and the values that they must have."""
    per_expert: bool = False
    """Whether the target stacks the joined parts of each expert along a new first axis. A rank holds the experts of its
    moe_ep_rank."""
    per_head: bool = False
    """Whether the target stacks the joined parts of each attention head along a new first axis. A rank holds its own heads. The
    axis 0 of a source holds the parts' sections of one head after the other."""
    dtype: str | None = None
    """Dtype of the target, safetensors' name; None: the model's."""
    layers: Layers = Layers.ALL
    """Layers that hold the target, where `where` is EVERY_LAYER."""

    def applies(self, config: ModelConfig) -> bool:
        return all(config.setting(name) == value for name, value in self.when.items())

    def in_layer(self, config: ModelConfig, layer: int) -> bool:
        """Whether a layer (global number) holds the target. A family of mixtures wants its experts of a config without any."""
        if self.layers is Layers.ALL:
            return True
        if self.layers in (Layers.VALUES, Layers.NO_VALUES):
            return config.has_values(layer) is (self.layers is Layers.VALUES)
        return (config.moe is None or config.has_experts(layer)) if self.layers is Layers.EXPERTS else not config.has_experts(layer)


PREDICTS_FURTHER = "it belongs to a layer that predicts a further token (MTP), and engines predict one"
"""Reason of source tensors that are left out although the model was trained with them: a plan notes them."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """Source tensors that are left out on purpose, with the reason."""

    pattern: str
    """fnmatch pattern of their names. May hold {last}, the number of the layer after the model's last."""
    reason: str
    when: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, config: ModelConfig) -> bool:
        return all(config.setting(name) == value for name, value in self.when.items())

    def matches(self, name: str, config: ModelConfig) -> bool:
        """Whether a source tensor is left out."""
        return fnmatch.fnmatchcase(name, self.pattern.replace("{last}", str(config.num_hidden_layers)))


@dataclass(frozen=True, slots=True)
class Family:
    """A model family as one table."""

    name: str
    architectures: tuple[str, ...]
    """Values of `architectures` in Hugging Face's config.json."""
    rules: tuple[Rule, ...]
    """Rules, in the order of the targets in a rank file."""
    ignored: tuple[Ignored, ...] = ()
    config: ConfigTable = field(default_factory=ConfigTable)
    """Table by which config.json is read."""


@dataclass(frozen=True, slots=True)
class Span:
    """Range of a cut axis that one rank holds: [begin, end), then `pad` zero rows."""

    begin: int
    end: int
    pad: int = 0

    @property
    def length(self) -> int:
        return self.end - self.begin + self.pad


def spans(cut: Cut, size: int, config: ModelConfig, topology: Topology) -> tuple[Span, ...]:
    """Return the span of each tensor-parallel rank on an axis of `size` elements. Raises TopologyError if it does not divide."""
    tp = topology.tp
    if cut.unit is Unit.VOCAB:
        rows = -(-size // tp)
        clipped = [(min(rank * rows, size), min((rank + 1) * rows, size)) for rank in range(tp)]
        return tuple(Span(begin, end, rows - (end - begin)) for begin, end in clipped)
    if cut.unit is Unit.EXPERT_ELEMENT:
        return tuple(_even(size, topology.moe_tp, topology.moe_ranks(rank)[0]) for rank in range(tp))
    if cut.unit is Unit.KV_HEAD and config.num_key_value_heads < tp:
        heads = config.num_key_value_heads
        if tp % heads:
            raise TopologyError(f"tp={tp} is not a multiple of the {heads} key/value heads")
        width = size // heads
        return tuple(Span(rank * heads // tp * width, (rank * heads // tp + 1) * width) for rank in range(tp))
    units = {Unit.HEAD: config.num_attention_heads, Unit.KV_HEAD: config.num_key_value_heads}.get(cut.unit, size)
    if units % tp:
        raise TopologyError(f"tp={tp} does not divide {units} ({cut.unit.value}s)")
    return tuple(_even(size, tp, rank) for rank in range(tp))


def _even(size: int, ranks: int, rank: int) -> Span:
    if size % ranks:
        raise TopologyError(f"{ranks} ranks do not divide {size} elements")
    width = size // ranks
    return Span(rank * width, (rank + 1) * width)
