"""Tables by which a family's config.json is read. Data only.

Defaults, precedence and the meaning of null are those of transformers 5.14: from the family's config class, or from its modeling
code where the class leaves them open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Supported kinds of rotary embedding."""
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new")
"""Activations that the networks support."""
XIELU = "xielu"
"""Activation with numbers of its own in each layer, two of them learned (Apertus)."""
SWIGLU = "swiglu"
"""TensorRT-LLM's name of a gated SiLU with one fused linear: `mlp.fc` joins up and gate, in this order, and there is no
`mlp.gate`."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A key of config.json that has a meaning in other families but that transformers does not read in this family."""

    why: str
    quiet: tuple[Any, ...] | None = (None, False)
    """Values without a warning, because they turn the feature off; None: no value needs a warning."""


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Table by which the rotary embedding is read."""

    theta: float = 10000.0
    """Default base."""
    local_theta: float | None = None
    """Default base of the layers with a window; None: all layers share one base."""
    kinds: tuple[str, ...] = ALL_KINDS
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Alias -> kind."""
    reads_type: bool = True
    """Whether transformers reads `type`, the older name of rope_type; if not, it is refused."""
    partial: bool = False
    """Whether partial_rotary_factor is read."""
    layers: str | None = None
    """Key of the list that says by 1 or 0 which layers are rotated, every no_rope_layer_interval-th not by default; None: all."""
    no_layers_mean_default: bool = False
    """Whether an empty list means the default (Llama 4)."""
    dense_too: str | None = None
    """Key that, where it is 1, rotates the layers without experts too, with only_windows (Cohere 2 MoE)."""
    only_windows: bool = False
    """Whether a model with a window rotates the layers that have it only (EXAONE 4)."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Rotary parameters of a config.json that has none."""
    complete: bool = False
    """Whether rope_parameters must hold the base, and rope_scaling, which transformers passes over, is refused (Cohere 2 MoE)."""
    by_kind: bool = False
    """Whether rope_parameters, which alone is read, has a dictionary for each kind of layer (Gemma 4)."""
    scales_queries: bool = False
    """Whether queries are scaled by position with llama_4_scaling_beta, which the parameters then hold (Ministral 3)."""
    temperature: tuple[str, str, str] | None = None
    """Keys by which the layers without rotary embedding scale queries by position: switch, length, factor; None: they do not."""
    scales_softmax: bool = False
    """Whether mscale_all_dim also scales the scores of attention (DeepSeek V3)."""
    alpha: bool = False
    """Whether `alpha` of a dynamic scaling raises the base within the trained length (Hunyuan)."""
    mscales: bool = False
    """Whether a scaling names its factors on cos and sin, short_mscale within the trained length and long_mscale beyond it."""
    whole: bool = False
    """Whether transformers' model of a rotated part fails, so that a part is refused."""
    fraction: float = 1.0
    """Default of partial_rotary_factor."""
    dim: str | None = None
    """Key of the number of rotated elements of a head, in place of partial_rotary_factor (MiniMax)."""


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Keys that describe a mixture of experts."""

    count: str
    size: str
    """Key of the intermediate size of an expert."""
    alias: str | None = None
    """Second key of the count (transformers' attribute_map). config.json holds one of the two."""
    switch: str | None = None
    """Key that decides whether the model has experts; None: it has."""
    chosen: str = "num_experts_per_tok"
    """Key of the number of experts per token."""
    listed_choice: bool = False
    """Whether that may be a list with a number for each layer."""
    selection: str | None = None
    """Key of the function that makes scores of the chosen logits, softmax or sigmoid; only the latter may be normalized."""
    combination: str | None = None
    """Key that says whether the shared expert is added to the others' sum, or averaged with it; None: it is added."""
    normalized: str | None = None
    """Key that decides whether the chosen experts' weights are scaled to sum to one; None: always."""
    shared_size: str | None = None
    """Key of the intermediate size of the shared expert; None: there is none."""
    shared_count: str | None = None
    """Key of the number of shared experts of an expert's size, in place of shared_size."""
    first: str = "first_k_dense_replace"
    """Key of the number of first layers without experts, for the rules that read it."""
    layers: str = "all"
    """Rule for the layers with experts, a name in config_experts.EXPERT_LAYERS."""
    groups: tuple[str, str] | None = None
    """Keys of the number of groups and of the groups that are kept; None: experts are not grouped."""
    routed_scale: str | None = None
    """Key of the factor of the weights; None: 1."""
    sum_minimum: str | None = None
    """Key of the smallest number that divides the weights; None: 0."""
    jitter: str | None = None
    """Key of the jitter of a SparseMixer; None: the router is another."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields of MoeConfig with the same value in every model of the family."""


@dataclass(frozen=True, slots=True)
class ConfigTable:
    """Table that turns a family's config.json into a ModelConfig."""

    model_types: tuple[str, ...] = ()
    """Values of `model_type` for which transformers picks this family's classes; empty: not checked."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Every key that the family reads -> default of its config class."""
    embedding_switch: str | None = None
    """Key that decides whether the embedding is multiplied by the root of hidden_size."""
    global_heads: bool = False
    """Whether layers without a window have heads of their own: global_head_dim, num_global_key_value_heads, attention_k_eq_v."""
    last_is_full: bool = False
    """Whether the last layer has no window, whatever layer_types says (Gemma 4)."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key -> its only values that are built, which its default need not be among."""
    required: frozenset[str] = frozenset()
    """Keys without which transformers fails, although its config class has a default for them."""
    nullable: frozenset[str] = frozenset()
    """Keys that may be null, which means no value rather than the default."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig with the same value in every model of the family."""
    derived: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Field of ModelConfig -> (name in model.config_hugging_face.TRANSFORMS, key of config.json)."""
    latent: bool = False
    """Whether attention is over latents (MLA), with the sizes q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and
    v_head_dim."""
    whole_heads: bool = False
    """Whether hidden_size must be a multiple of num_attention_heads even if head_dim is given."""
    queries_fill_hidden: bool = False
    """Whether the heads must have hidden_size elements together, because the output projection is square (Helium)."""
    epsilon: str = "rms_norm_eps"
    """Key of the norms' epsilon."""
    rms_epsilon: str | None = None
    """Key of an epsilon with which norms are RMSNorms, in place of `epsilon` and LayerNorms (Cohere 2 MoE)."""
    dense_size: str = "intermediate_size"
    """Key of the intermediate size of a dense MLP; where it is null, intermediate_size is that size."""
    activation: str = "hidden_act"
    """Key of the activation."""
    activations: Mapping[str, str] = field(default_factory=lambda: {name: name for name in ACTIVATIONS})
    """Value of the activation -> hidden_act of ModelConfig."""
    windows: str = "none"
    """Rule for the layers with a window, a name in config_windows.WINDOW_RULES."""
    window_key: str = "sliding_window"
    """Key of the number of positions of a window."""
    window_kind: str = "sliding_attention"
    """Entry of layer_types for a layer with a window."""
    rotary: RotaryTable = field(default_factory=RotaryTable)
    experts: ExpertTable | None = None
    passed_over: Mapping[str, PassedOver] = field(default_factory=dict)
    doubts: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    """(key, value) -> why transformers' reading, which is built, may not be what the model's authors meant."""
