"""The shape of a decoder model, in TensorRT-LLM's terms (`PretrainedConfig` of TensorRT-LLM 0.16), global, never per rank.

Everything that a rank's network and weights follow from stands here as data; what tells families apart is values, not code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.errors import ArchitectureError, TopologyError
from orchestrator.core.quantization import ModelQuantization, quantization_config
from orchestrator.core.topology import ParallelLimits, Topology


class MoeConfig(BaseModel):
    """Mixture of experts, with the names of TensorRT-LLM's `moe` dictionary."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    normalization_mode: int = 1
    """1: the chosen experts' probabilities are scaled to sum to one; 0: they are not."""
    shared_expert_intermediate_size: int = 0
    """0: no shared expert."""


class ModelConfig(BaseModel):
    """What a rank's network and its weights follow from."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: str
    dtype: Literal["float16", "bfloat16", "float32"]
    vocab_size: int = Field(ge=1)
    """Unpadded."""
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    hidden_act: str
    norm_epsilon: float
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Norms before attention and MLP, after them (OLMo 2), or both (Gemma 2 and 3)."""
    max_position_embeddings: int = Field(ge=1)
    rotary_base: float
    rotary_scaling: dict[str, Any] | None = None
    """Hugging Face's dictionary as it is; None: plain rotary embedding."""
    rotary_base_local: float | None = None
    """Of the layers with a window, unscaled, where it differs (Gemma 3)."""
    rotary_embedding_dim: int | None = None
    """Leading elements of a head that are rotated; None: all."""
    sliding_window: int | None = None
    """A token attends to this many positions, itself included; None: to all before it."""
    window_layers: tuple[bool, ...] | None = None
    """Which layers have the window; None: all, if there is one."""
    attn_bias: bool = False
    """Of queries, keys and values."""
    attn_dense_bias: bool = False
    mlp_bias: bool = False
    exact_norms: bool = False
    """Norms' weights stand a second time in the rank files, in float32 (`..._float32`), and the graph reads those. Families whose
    norms scale by weight + 1 have them: rounded to bfloat16, as TensorRT-LLM stores it, the sum loses up to 2 ** -8 of it."""
    qk_layernorm: Literal["none", "head", "full"] = "none"
    """Norm of queries and keys: per head (Qwen 3, Gemma 3), or over all heads at once (OLMo 2)."""
    attention_scale: float | None = None
    """None: head_size ** -0.5."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    """Logits are divided by it."""
    tie_word_embeddings: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    """With use_parallel_embedding: 0 by vocabulary (padded), 1 by hidden size."""
    moe: MoeConfig | None = None
    moe_intermediate_size: int | None = None
    """Of each expert; None: intermediate_size."""

    def limits(self) -> ParallelLimits:
        """The numbers that decide which topologies are legal."""
        experts = self.moe.num_experts if self.moe else 0
        return ParallelLimits(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self._dense_size(),
            experts,
            self.expert_size,
        )

    def _dense_size(self) -> int:
        """The intermediate size that all tp ranks share: of the MLP, or of the shared expert beside experts."""
        if self.moe is None:
            return self.intermediate_size
        return self.moe.shared_expert_intermediate_size

    @property
    def expert_size(self) -> int:
        """Intermediate size of an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    def dims(self) -> dict[str, int]:
        """The sizes that rules name in their shapes."""
        moe = self.moe
        return {
            "hidden": self.hidden_size,
            "q": self.num_attention_heads * self.head_size,
            "kv": self.num_key_value_heads * self.head_size,
            "head": self.head_size,
            "inter": self.intermediate_size,
            "vocab": self.vocab_size,
            "one": 1,
            "experts": moe.num_experts if moe else 0,
            "expert_inter": self.expert_size,
            "shared_inter": moe.shared_expert_intermediate_size if moe else 0,
        }

    @property
    def trained_length(self) -> int:
        """Positions of the texts that the model was trained on, before its rotary scaling."""
        scaling = self.rotary_scaling or {}
        # Dynamic scaling counts from the model's positions, whatever else its dictionary holds (transformers 5).
        original = None if scaling.get("rope_type") == "dynamic" else scaling.get("original_max_position_embeddings")
        return int(original or self.max_position_embeddings)

    def rotary_depends_on_length(self, length: int) -> bool:
        """Whether a text of up to `length` positions may need other frequencies than a short one."""
        kind = (self.rotary_scaling or {}).get("rope_type")
        return kind in ("longrope", "dynamic") and length > self.trained_length

    @property
    def max_positions(self) -> int:
        """Positions that the model may be used with: its own, or those that its rotary scaling stretches the trained ones to."""
        scaling = self.rotary_scaling or {}
        stretched = 0
        if scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
            stretched = int(self.trained_length * float(scaling.get("factor") or 1.0))
        return max(self.max_position_embeddings, stretched)

    def has_window(self, layer: int) -> bool:
        """Whether a global layer attends through the window only."""
        return self.sliding_window is not None and (self.window_layers is None or self.window_layers[layer])

    def kv_heads_per_rank(self, tp: int) -> int:
        """max(K / tp, 1): with more ranks than key/value heads each head is held by tp / K ranks."""
        return max(self.num_key_value_heads // tp, 1)

    def padded_vocab_size(self, tp: int) -> int:
        """ceil(V / tp) * tp, as TensorRT-LLM's `pad_vocab_size`."""
        return -(-self.vocab_size // tp) * tp


TRANSFORMS: dict[str, Callable[[float], float]] = {
    "is": lambda value: value,
    "sqrt": lambda value: value**0.5,
    "rsqrt": lambda value: value**-0.5,
}


@dataclass(frozen=True, slots=True)
class ConfigTable:
    """How a family's config.json becomes a ModelConfig, beyond what all decoders share. Data only."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the family's config class assumes for keys that config.json may omit."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that every model of the family has."""
    derived: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Field of ModelConfig -> (name in TRANSFORMS, key of config.json); a key that is absent or null leaves the default."""
    window_pattern: int | None = None
    """Without layer_types in config.json: every so-manieth layer is without a window; None: all have one."""


def from_hugging_face(config: Mapping[str, Any], architecture: str, dtype: str, table: ConfigTable) -> ModelConfig:
    """Translate a Hugging Face config.json of transformers 4 or 5.

    Raises ArchitectureError naming the key that is missing or impossible.
    """
    merged = {**table.defaults, **{key: value for key, value in config.items() if value is not None}}

    def need(key: str) -> Any:
        if key not in merged:
            raise ArchitectureError(f"config.json of {architecture} has no {key!r}", "Use the complete config.json of the model.")
        return merged[key]

    try:
        return _translate(merged, need, architecture, dtype, table)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ArchitectureError(f"config.json of {architecture} holds an impossible value: {error}") from None


def _translate(
    merged: Mapping[str, Any], need: Callable[[str], Any], architecture: str, dtype: str, table: ConfigTable
) -> ModelConfig:
    def count(key: str) -> int:
        value = need(key)
        if not isinstance(value, int) or value < 1:
            raise ArchitectureError(f"{key} in config.json of {architecture} is {value!r}, not a positive number")
        return value

    heads, layers = count("num_attention_heads"), count("num_hidden_layers")
    head_size = merged.get("head_dim") or count("hidden_size") // heads
    derived = {
        name: TRANSFORMS[transform](merged[key]) for name, (transform, key) in table.derived.items() if merged.get(key) is not None
    }
    fields: dict[str, Any] = {
        "vocab_size": count("vocab_size"),
        "hidden_size": count("hidden_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": merged.get("num_key_value_heads", heads),
        "head_size": head_size,
        "intermediate_size": count("intermediate_size"),
        "hidden_act": merged.get("hidden_activation") or need("hidden_act"),
        "norm_epsilon": need("rms_norm_eps"),
        "max_position_embeddings": count("max_position_embeddings"),
        "rotary_embedding_dim": _rotary_dim(merged, head_size),
        "attn_bias": bool(merged.get("attention_bias", False)),
        "attn_dense_bias": bool(merged.get("attention_bias", False)),
        "mlp_bias": bool(merged.get("mlp_bias", False)),
        "tie_word_embeddings": bool(merged.get("tie_word_embeddings", False)),
        **_rotary(merged),
        **_windows(merged, layers, table),
        **_moe(merged),
    }
    return ModelConfig.model_validate({"architecture": architecture, "dtype": dtype, **fields, **derived, **table.constants})


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling from transformers 5 (`rope_parameters`, per kind of layer or not) or 4 (`rope_theta`, `rope_scaling`)."""
    parameters: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    local = config.get("rope_local_base_freq")
    if isinstance(parameters.get("full_attention"), dict):
        sliding = parameters.get("sliding_attention") or {}
        local = sliding.get("rope_theta", local)
        parameters = dict(parameters["full_attention"])
    base = float(parameters.pop("rope_theta", config.get("rope_theta", 10000.0)))
    parameters.pop("partial_rotary_factor", None)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    scaling = None if kind == "default" else {**parameters, "rope_type": kind}
    if scaling is not None and kind in ("longrope", "yarn", "dynamic"):
        original = config.get("original_max_position_embeddings", config["max_position_embeddings"])
        scaling.setdefault("original_max_position_embeddings", original)
    return {"rotary_base": base, "rotary_scaling": scaling, "rotary_base_local": None if local is None else float(local)}


def _rotary_dim(config: Mapping[str, Any], head_size: int) -> int | None:
    parameters = config.get("rope_parameters") or {}
    factor = float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    return None if factor == 1.0 else int(head_size * factor)


def _windows(config: Mapping[str, Any], layers: int, table: ConfigTable) -> dict[str, Any]:
    """The window, and which layers have it: as layer_types says, else by the family's pattern."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return {"sliding_window": None}
    kinds = config.get("layer_types")
    pattern = config.get("sliding_window_pattern", table.window_pattern)
    if kinds:
        chosen = tuple(kind == "sliding_attention" for kind in kinds)
    elif "max_window_layers" in config:
        chosen = tuple(layer >= config["max_window_layers"] for layer in range(layers))
    elif pattern:
        chosen = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    else:
        chosen = (True,) * layers
    if len(chosen) != layers:
        raise ValueError(f"layer_types has {len(chosen)} entries for {layers} layers")
    return {"sliding_window": window if any(chosen) else None, "window_layers": None if all(chosen) else chosen}


def _moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Experts, under the names that Mixtral and Qwen use."""
    experts = config.get("num_local_experts", config.get("num_experts"))
    if not experts:
        return {}
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ValueError("layers without experts between layers with experts are not supported")
    moe = {
        "num_experts": experts,
        "top_k": config.get("num_experts_per_tok", 2),
        "normalization_mode": int(bool(config.get("norm_topk_prob", True))),
        "shared_expert_intermediate_size": config.get("shared_expert_intermediate_size", 0),
    }
    return {"moe": moe, "moe_intermediate_size": config.get("moe_intermediate_size")}


def to_trtllm(config: ModelConfig, topology: Topology, quantization: ModelQuantization | None = None) -> dict[str, Any]:
    """config.json of a TensorRT-LLM checkpoint (field names and values as TensorRT-LLM 0.16 writes them).

    Fields of ours that TensorRT-LLM has no name for are written only where they differ from their default: its reader sets
    unknown keys with a warning.
    """
    mapping: dict[str, Any] = {
        "world_size": topology.world_size, "gpus_per_node": 8,
        "cp_size": topology.cp, "tp_size": topology.tp, "pp_size": topology.pp,
        "moe_tp_size": topology.moe_tp, "moe_ep_size": topology.moe_ep,
    }  # fmt: skip
    if topology.pp_partition is not None:
        mapping["pp_partition"] = list(topology.pp_partition)
    fields = {
        name: value
        for name, value in config.model_dump(mode="json").items()
        if name in _ALWAYS or value != ModelConfig.model_fields[name].default
    }
    return {
        **fields,
        "logits_dtype": "float32",
        "position_embedding_type": "rope_gpt_neox",
        "rotary_embedding_dim": config.rotary_embedding_dim or config.head_size,
        "use_parallel_embedding": config.use_parallel_embedding,
        "embedding_sharding_dim": config.embedding_sharding_dim,
        "qk_layernorm": config.qk_layernorm != "none",
        "qk_layernorm_kind": config.qk_layernorm,
        "mapping": mapping,
        "quantization": quantization_config(quantization),
    }


_ALWAYS = {
    "architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_size", "intermediate_size", "hidden_act", "norm_epsilon", "max_position_embeddings", "rotary_base", "rotary_scaling",
    "attn_bias", "mlp_bias", "tie_word_embeddings",
}  # fmt: skip


def from_trtllm(config: Mapping[str, Any]) -> tuple[ModelConfig, Topology]:
    """Read config.json of a TensorRT-LLM checkpoint, ours or NVIDIA's; keys that do not concern us are passed over.

    Raises TopologyError for a mapping that contradicts itself, ValueError for values that no model can have.
    """
    topology = _mapping(config.get("mapping") or {}, has_experts=bool((config.get("moe") or {}).get("num_experts")))
    known = {key: value for key, value in config.items() if key in ModelConfig.model_fields and value is not None}
    heads = known.get("num_attention_heads", 1)
    known.setdefault("num_key_value_heads", heads)
    known.setdefault("head_size", known.get("hidden_size", 1) // heads)
    known.setdefault("rotary_base", 10000.0)
    known.setdefault("norm_epsilon", 1e-5)
    architecture = str(known.get("architecture", ""))
    known.setdefault("attn_dense_bias", bool(known.get("attn_bias")) and "Qwen" not in architecture)
    known["qk_layernorm"] = config.get("qk_layernorm_kind") or ("head" if config.get("qk_layernorm") else "none")
    if known.get("rotary_embedding_dim") == known["head_size"]:
        del known["rotary_embedding_dim"]
    if not (known.get("moe") or {}).get("num_experts"):
        known.pop("moe", None)
    return ModelConfig.model_validate(known), topology


def _mapping(mapping: Mapping[str, Any], *, has_experts: bool) -> Topology:
    """The topology of `mapping`: all keys (TensorRT-LLM's converter) or only world_size, tp_size and pp_size (Model Optimizer).

    Without experts the moe sizes decide nothing, and versions differ in what they write there.
    """
    tp, pp, cp = (int(mapping.get(key) or 1) for key in ("tp_size", "pp_size", "cp_size"))
    moe_ep = int(mapping.get("moe_ep_size") or 1) if has_experts else 1
    moe_tp = int(mapping.get("moe_tp_size") or -1)
    partition = mapping.get("pp_partition")
    topology = Topology(tp, pp, tuple(partition) if partition else None, max(moe_ep, 1), cp)
    world_size = mapping.get("world_size", topology.world_size)
    if world_size != topology.world_size:
        raise TopologyError(
            f"mapping of config.json: world_size {world_size} is not tp_size {tp} x pp_size {pp} x cp_size {cp}",
            f"Set world_size to {topology.world_size}, or the sizes to those that the checkpoint was written with.",
        )
    if has_experts and moe_tp > 0 and moe_tp * topology.moe_ep != tp:
        legal = ", ".join(f"{tp // ep} x {ep}" for ep in range(1, tp + 1) if tp % ep == 0)
        raise TopologyError(
            f"mapping of config.json: moe_tp_size {moe_tp} x moe_ep_size {topology.moe_ep} is not tp_size {tp}",
            f"Legal here: moe_tp_size x moe_ep_size in {legal}.",
        )
    return topology
