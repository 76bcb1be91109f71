"""The vocabulary in which a family says how its tensors become rank tensors. Data only: frozen, evaluated on shapes alone.

"Cut, then join": each rank's slice of every part is taken first, then the slices are joined along the first axis. That is
what makes ranged reads possible, and key/value heads held by several ranks fall out of the unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.base.errors import TopologyError
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_table import ConfigTable as ConfigTable  # families name it from here
from orchestrator.model.topology import Topology


class Unit(Enum):
    """What must stay together when an axis is cut."""

    ELEMENT = "element"
    HEAD = "head"
    KV_HEAD = "kv_head"
    """Held by several ranks when there are more ranks than heads."""
    EXPERT_ELEMENT = "expert_element"
    """Cut over the moe_tp ranks that share an expert."""
    VOCAB = "vocab"
    """Padded with zero rows to a multiple of the number of ranks."""


class Where(Enum):
    """Which ranks hold a rule's target."""

    EVERY_LAYER = "layer"
    FIRST_STAGE = "first"
    LAST_STAGE = "last"


@dataclass(frozen=True, slots=True)
class Cut:
    """An axis to split over the tensor-parallel ranks, and its unit."""

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
class Part:
    """One source tensor of a target."""

    source: str
    """May hold {layer}, the global layer number, and {expert}."""
    shape: tuple[str, ...]
    """Names of ModelConfig.dims(), checked against the header."""
    cut: Cut | None = None
    """None: every rank holds the whole."""
    sections: tuple[str, ...] = ()
    """Names of dims() that the source tensor is fused from along axis 0 (Phi-3); empty: the part is the whole tensor."""
    section: int = 0
    """Which of them this part is."""
    add: float = 0.0
    """Added to every element, in float32, before rounding (Gemma's norms are stored as weight + 1)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One target tensor and the parts that it is joined from, along axis 0."""

    target: str
    """May hold {layer}, the layer's number within its pipeline stage."""
    parts: tuple[Part, ...]
    where: Where = Where.EVERY_LAYER
    when: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that must have these values for the rule to apply."""
    per_expert: bool = False
    """The target stacks one such join per expert, along a new first axis; a rank holds the experts of its moe_ep_rank."""
    dtype: str | None = None
    """safetensors' name; None: the model's."""

    def applies(self, config: ModelConfig) -> bool:
        return all(getattr(config, name) == value for name, value in self.when.items())


@dataclass(frozen=True, slots=True)
class Ignored:
    """Source tensors that are left out on purpose, and why."""

    pattern: str
    """As in fnmatch."""
    reason: str
    when: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, config: ModelConfig) -> bool:
        return all(getattr(config, name) == value for name, value in self.when.items())


@dataclass(frozen=True, slots=True)
class Family:
    """A model family as one table."""

    name: str
    architectures: tuple[str, ...]
    """Of Hugging Face's config.json."""
    rules: tuple[Rule, ...]
    """In the order in which a rank's file holds the targets."""
    ignored: tuple[Ignored, ...] = ()
    config: ConfigTable = field(default_factory=ConfigTable)
    """How config.json is read."""


@dataclass(frozen=True, slots=True)
class Span:
    """What one rank takes of a cut axis: [begin, end), then `pad` zero rows."""

    begin: int
    end: int
    pad: int = 0

    @property
    def length(self) -> int:
        return self.end - self.begin + self.pad


def spans(cut: Cut, size: int, config: ModelConfig, topology: Topology) -> tuple[Span, ...]:
    """The span of each tensor-parallel rank on an axis of `size` elements. Raises TopologyError when it does not divide."""
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
