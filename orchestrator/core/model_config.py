"""The shape of a decoder model, in TensorRT-LLM's terms (`PretrainedConfig` of TensorRT-LLM 0.16), global, never per rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.core.errors import ArchitectureError
from orchestrator.core.topology import ParallelLimits, Topology


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
    max_position_embeddings: int = Field(ge=1)
    rotary_base: float
    rotary_scaling: dict[str, Any] | None = None
    """Hugging Face's dictionary as it is; None: plain rotary embedding."""
    sliding_window: int | None = None
    """A token attends to this many positions, itself included; None: to all before it."""
    attn_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def limits(self) -> ParallelLimits:
        return ParallelLimits(self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads, self.intermediate_size)

    def dims(self) -> dict[str, int]:
        """The sizes that rules name in their shapes."""
        return {
            "hidden": self.hidden_size,
            "q": self.num_attention_heads * self.head_size,
            "kv": self.num_key_value_heads * self.head_size,
            "inter": self.intermediate_size,
            "vocab": self.vocab_size,
        }

    def kv_heads_per_rank(self, tp: int) -> int:
        """max(K / tp, 1): with more ranks than key/value heads each head is held by tp / K ranks."""
        return max(self.num_key_value_heads // tp, 1)

    def padded_vocab_size(self, tp: int) -> int:
        """ceil(V / tp) * tp, as TensorRT-LLM's `pad_vocab_size`."""
        return -(-self.vocab_size // tp) * tp


def from_hugging_face(config: Mapping[str, Any], architecture: str, dtype: str, defaults: Mapping[str, Any]) -> ModelConfig:
    """Translate a Hugging Face config.json of transformers 4 or 5.

    `defaults` are the family's values for keys that its config class may omit. Raises ArchitectureError naming the key
    that is missing.
    """
    merged = {**defaults, **{key: value for key, value in config.items() if value is not None}}

    def need(key: str) -> Any:
        if key not in merged:
            raise ArchitectureError(f"config.json of {architecture} has no {key!r}", "Use the complete config.json of the model.")
        return merged[key]

    try:
        return _translate(merged, need, architecture, dtype)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ArchitectureError(f"config.json of {architecture} holds an impossible value: {error}") from None


def _translate(merged: Mapping[str, Any], need: Callable[[str], Any], architecture: str, dtype: str) -> ModelConfig:
    def count(key: str) -> int:
        value = need(key)
        if not isinstance(value, int) or value < 1:
            raise ArchitectureError(f"{key} in config.json of {architecture} is {value!r}, not a positive number")
        return value

    heads = count("num_attention_heads")
    base, scaling = _rotary(merged)
    return ModelConfig(
        architecture=architecture,
        dtype=dtype,
        vocab_size=count("vocab_size"),
        hidden_size=count("hidden_size"),
        num_hidden_layers=count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=merged.get("num_key_value_heads", heads),
        head_size=merged.get("head_dim", count("hidden_size") // heads),
        intermediate_size=count("intermediate_size"),
        hidden_act=need("hidden_act"),
        norm_epsilon=need("rms_norm_eps"),
        max_position_embeddings=count("max_position_embeddings"),
        rotary_base=base,
        rotary_scaling=scaling,
        sliding_window=merged.get("sliding_window"),
        attn_bias=bool(merged.get("attention_bias", False)),
        mlp_bias=bool(merged.get("mlp_bias", False)),
        tie_word_embeddings=bool(merged.get("tie_word_embeddings", False)),
    )


def _rotary(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling from transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = float(parameters.pop("rope_theta", config.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return base, None if kind == "default" else {**parameters, "rope_type": kind}


_OWN_FIELDS = ("sliding_window",)


def to_trtllm(config: ModelConfig, topology: Topology) -> dict[str, Any]:
    """config.json of a TensorRT-LLM checkpoint, unquantized (field names and values as TensorRT-LLM 0.16 writes them)."""
    tp, pp = topology.tp, topology.pp
    mapping: dict[str, Any] = {
        "world_size": topology.world_size, "gpus_per_node": 8, "cp_size": 1, "tp_size": tp, "pp_size": pp,
        "moe_tp_size": tp, "moe_ep_size": 1,
    }  # fmt: skip
    if topology.pp_partition is not None:
        mapping["pp_partition"] = list(topology.pp_partition)
    quantization = {
        "quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "smoothquant_val": 0.5, "clamp_val": None,
        "use_meta_recipe": False, "has_zero_point": False, "pre_quant_scale": False, "exclude_modules": None,
    }  # fmt: skip
    fields = config.model_dump()
    own = {name: fields.pop(name) for name in _OWN_FIELDS if fields[name] is not None} or {}
    for name in _OWN_FIELDS:
        fields.pop(name, None)
    return {
        **fields,
        **own,
        "logits_dtype": "float32",
        "position_embedding_type": "rope_gpt_neox",
        "rotary_embedding_dim": config.head_size,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "qk_layernorm": False,
        "mapping": mapping,
        "quantization": quantization,
    }


def from_trtllm(config: Mapping[str, Any]) -> tuple[ModelConfig, Topology]:
    """Read config.json of a TensorRT-LLM checkpoint, ours or NVIDIA's; keys that do not concern us are passed over."""
    mapping = config.get("mapping") or {}
    partition = mapping.get("pp_partition")
    topology = Topology(mapping.get("tp_size", 1), mapping.get("pp_size", 1), tuple(partition) if partition else None)
    known = {key: value for key, value in config.items() if key in ModelConfig.model_fields and value is not None}
    heads = known.get("num_attention_heads", 1)
    known.setdefault("num_key_value_heads", heads)
    known.setdefault("head_size", known.get("hidden_size", 1) // heads)
    known.setdefault("rotary_base", 10000.0)
    known.setdefault("norm_epsilon", 1e-5)
    return ModelConfig(**known), topology
