"""The vocabulary in which a family says how its config.json is read. Data only.

Defaults, precedence and the meaning of null are those of transformers 5.14: of the family's config class, and of its modeling
code where the class leaves something open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Kinds of rotary embedding that there are formulas for."""
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new")
"""Activations that the networks have operators for."""
SWIGLU = "swiglu"
"""TensorRT-LLM's name of a SiLU whose factor comes from the same linear: `mlp.fc` joins up and gate, in this order, and there is
no `mlp.gate`."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A key of config.json that transformers does not read in this family, although it means something in others."""

    why: str
    quiet: tuple[Any, ...] | None = (None, False)
    """Values that need no warning, for they ask for nothing; None: no value does."""


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """How the rotary embedding is read."""

    theta: float = 10000.0
    """Base where config.json gives none."""
    local_theta: float | None = None
    """Base of the layers with a window where config.json gives none; None: all layers share one base."""
    kinds: tuple[str, ...] = ALL_KINDS
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of kinds."""
    partial: bool = False
    """Whether partial_rotary_factor is read."""


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Under which keys a mixture of experts is described."""

    count: str
    size: str
    """Intermediate size of an expert."""
    alias: str | None = None
    """Second key of the count (transformers' attribute_map); config.json holds one of the two."""
    normalized: str | None = None
    """Key that decides whether the chosen probabilities are scaled to sum to one; None: always."""
    shared_size: str | None = None
    """Intermediate size of the shared expert; None: there is none."""


@dataclass(frozen=True, slots=True)
class ConfigTable:
    """How a family's config.json becomes a ModelConfig."""

    model_types: tuple[str, ...] = ()
    """Values of `model_type` by which transformers picks this family's classes; empty: not checked."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Every key that means something to the family, and what its config class assumes where config.json omits it."""
    nullable: frozenset[str] = frozenset()
    """Keys that may be null: no value, which is not the same as an omitted key's default."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that every model of the family has."""
    derived: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Field of ModelConfig -> (name in model_config.TRANSFORMS, key of config.json)."""
    whole_heads: bool = False
    """Whether hidden_size must be a multiple of num_attention_heads, even where head_dim is given."""
    activation: str = "hidden_act"
    """Key of the activation."""
    activations: Mapping[str, str] = field(default_factory=lambda: {name: name for name in ACTIVATIONS})
    """Its value -> hidden_act of ModelConfig."""
    windows: str = "none"
    """Name in config_windows.WINDOW_RULES: which layers have a window."""
    rotary: RotaryTable = field(default_factory=RotaryTable)
    experts: ExpertTable | None = None
    passed_over: Mapping[str, PassedOver] = field(default_factory=dict)
    doubts: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    """(key, value) -> why transformers' reading of it, which is built, may not be what the authors meant."""
