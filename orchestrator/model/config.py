"""Config of a decoder model, in TensorRT-LLM's terms (`PretrainedConfig` of TensorRT-LLM 0.16). Sizes are global, never per rank.

It determines the network and the weights of every rank. Families differ in its values, not in code.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.model.config_experts import MoeConfig as MoeConfig  # re-exported
from orchestrator.model.config_table import ConfigTable as ConfigTable  # re-exported
from orchestrator.model.topology import ParallelLimits


def _is_unset(value: Any) -> bool:
    """Whether a field that only some families have is left out of files: so steps of other models keep their digest."""
    return not value


def _is_rms(value: Any) -> bool:
    return bool(value == "rms")


class ModelConfig(BaseModel):
    """Config of a decoder model, which determines the network and the weights of every rank."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: str
    dtype: Literal["float16", "bfloat16", "float32"]
    vocab_size: int = Field(ge=1)
    """Vocabulary size, without padding."""
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    """Number of key/value heads; 1 with latent attention, whose heads share one latent."""
    head_size: int = Field(ge=1)
    """Size of a query head; with latent attention, qk_nope_head_dim and the rotated part together."""
    global_head_size: int = Field(0, ge=0, exclude_if=_is_unset)
    """Size of a head in the layers without a window (Gemma 4); 0: head_size."""
    global_kv_heads: int = Field(0, ge=0, exclude_if=_is_unset)
    """Number of key/value heads in the layers without a window, with global_head_size."""
    values_are_keys: bool = Field(False, exclude_if=_is_unset)
    """Whether the layers without a window take the keys, before their norm, as values (Gemma 4)."""
    value_norm: bool = Field(False, exclude_if=_is_unset)
    """Whether values are normed per head, without a weight (Gemma 4)."""
    layer_scalar: bool = Field(False, exclude_if=_is_unset)
    """Whether a stored number multiplies what each layer returns (Gemma 4)."""
    intermediate_size: int = Field(ge=1)
    hidden_act: str
    norm_epsilon: float
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Position of the norms: before attention and MLP, after them (OLMo 2), or both (Gemma 2 and 3)."""
    norm_kind: Literal["rms", "layer"] = Field("rms", exclude_if=_is_rms)
    """Whether norms divide by the root mean square, or subtract the mean first (LayerNorm). Norms of heads do the former."""
    norm_bias: bool = Field(False, exclude_if=_is_unset)
    """Whether norms add a bias."""
    parallel_blocks: bool = Field(False, exclude_if=_is_unset)
    """Whether attention and MLP read the same normed input and are added to the hidden states together (Cohere)."""
    max_position_embeddings: int = Field(ge=1)
    rotary_base: float
    rotary_scaling: dict[str, Any] | None = None
    """Hugging Face's dictionary, with all keys of its rope_type and without the base; None: plain rotary embedding."""
    rotary_base_local: float | None = None
    """Rotary base of the layers with a window, which are not scaled (Gemma 3); None: rotary_base."""
    rotary_embedding_dim: int | None = None
    """Number of elements of a head that are rotated: the leading ones, with latent attention the trailing ones; None: all."""
    rotary_layers: tuple[bool, ...] | None = Field(None, exclude_if=_is_unset)
    """Whether each layer has rotary embedding; None: all have it."""
    rotary_interleaved: bool = Field(False, exclude_if=_is_unset)
    """Whether an element is rotated with its neighbour (DeepSeek), instead of with the one half the rotated part away."""
    sliding_window: int | None = None
    """Number of positions that a token attends to, itself included; None: all before it."""
    window_layers: tuple[bool, ...] | None = None
    """Whether each layer has the window; None: all layers have it, if sliding_window is set."""
    chunked_windows: bool = Field(False, exclude_if=_is_unset)
    """Whether windows do not slide: a token attends to its own chunk of sliding_window positions (Llama 4)."""
    attn_bias: bool = False
    """Whether queries, keys and values have biases."""
    attn_dense_bias: bool = False
    attention_gate: bool = Field(False, exclude_if=_is_unset)
    """Whether the sigmoid of a projection of the layer's input multiplies what attention returns, before the output projection."""
    attention_sinks: bool = Field(False, exclude_if=_is_unset)
    """Whether each head has a sink: a learned score that takes part in its softmax and has no value (gpt-oss)."""
    kv_lora_rank: int = Field(0, ge=0, exclude_if=_is_unset)
    """Size of the latent from which all heads make keys and values (multi-head latent attention, MLA); 0: no latent attention."""
    q_lora_rank: int = Field(0, ge=0, exclude_if=_is_unset)
    """Size of the latent from which queries are made; 0: they are made from the hidden states."""
    qk_nope_head_dim: int = Field(0, ge=0, exclude_if=_is_unset)
    """Number of leading elements of a query that meet the latent, not the rotated key (MLA)."""
    v_head_dim: int = Field(0, ge=0, exclude_if=_is_unset)
    """Size of a value (MLA); 0: head_size."""
    mlp_bias: bool = False
    mlp_gated: bool = Field(True, exclude_if=bool)
    """Whether the dense MLP computes act(fc(x)) * gate(x); else act(fc(x))."""
    exact_norms: bool = False
    """Store a float32 copy (`..._float32`) of each norm in the rank files, which the graph reads. For families whose norms scale by
    weight + 1: rounding the sum to bfloat16, as TensorRT-LLM's format does, loses up to 2 ** -8 of it."""
    qk_layernorm: Literal["none", "head", "full", "rotated"] = "none"
    """Norm of queries and keys: per head (Qwen 3, Gemma 3), over all heads at once (OLMo 2), or per head without a weight, in the
    layers with rotary embedding only (Llama 4)."""
    qk_norm_after_rotary: bool = Field(False, exclude_if=_is_unset)
    """Whether queries and keys are rotated before they are normed."""
    attention_scale: float | None = None
    """Factor of the attention scores; None: head_size ** -0.5."""
    query_scale_beta: float | None = Field(None, exclude_if=_is_unset)
    """Scale of queries by position (Ministral 3): 1 + beta * log(1 + position // trained length); None: not scaled."""
    query_scale_floor: int | None = Field(None, ge=1, exclude_if=_is_unset)
    """Length with which only the layers without rotary embedding scale queries (Llama 4): 1 + beta * log(1 + (position + 1) //
    floor); None: all layers, by the trained length."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    """Divisor of the logits."""
    head_bias: bool = Field(False, exclude_if=_is_unset)
    """Whether the head, which makes the logits, has a bias (Phi-3.5-MoE)."""
    tie_word_embeddings: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    """Axis of the split embedding, with use_parallel_embedding. 0: vocabulary (padded); 1: hidden size."""
    moe: MoeConfig | None = None
    moe_intermediate_size: int | None = None
    """Intermediate size of an expert; None: intermediate_size."""

    def limits(self) -> ParallelLimits:
        """Return the numbers that decide which topologies are legal."""
        kinds = {self.has_experts(layer) for layer in range(self.num_hidden_layers)}
        moe = self.moe if True in kinds else None
        return ParallelLimits(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.intermediate_size if False in kinds else 0,
            moe.num_experts if moe else 0,
            self.expert_size,
            moe.shared_expert_intermediate_size if moe else 0,
            self.global_kv_heads,
        )

    def of_layer(self, layer: int) -> ModelConfig:
        """Return the config with the sizes of a layer's heads (global number) as those of all."""
        return self if not self.global_head_size or self.has_window(layer) else self._of_global_layers

    @cached_property
    def _of_global_layers(self) -> ModelConfig:
        own = {"head_size": self.global_head_size, "num_key_value_heads": self.global_kv_heads}
        return self.model_copy(update={**own, "global_head_size": 0, "global_kv_heads": 0})

    def has_values(self, layer: int) -> bool:
        """Whether a layer (global number) projects values, instead of taking the keys."""
        return not self.values_are_keys or self.has_window(layer)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (global number) has experts, instead of a dense MLP."""
        return self.moe is not None and (self.moe.layers is None or self.moe.layers[layer])

    def setting(self, name: str) -> Any:
        """Return a field, or one of a part, such as moe.selection_bias; None where the model has not got that part."""
        value: Any = self
        for part in name.split("."):
            value = None if value is None else getattr(value, part)
        return value

    @property
    def expert_size(self) -> int:
        """Intermediate size of an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    def dims(self) -> dict[str, int]:
        """Return the sizes that rules name in their shapes."""
        moe = self.moe
        return {
            "hidden": self.hidden_size,
            "q": self.num_attention_heads * self.head_size,
            "v": self.num_attention_heads * self.value_size,
            "kv": self.num_key_value_heads * self.head_size,
            "head": self.head_size,
            "nope": self.qk_nope_head_dim,
            "value": self.value_size,
            "q_lora": self.q_lora_rank,
            "kv_lora": self.kv_lora_rank,
            "latent": self.cache_head_size,
            "inter": self.intermediate_size,
            "vocab": self.vocab_size,
            "heads": self.num_attention_heads,
            "one": 1,
            "experts": moe.num_experts if moe else 0,
            "expert_inter": self.expert_size,
            "shared_inter": moe.shared_expert_intermediate_size if moe else 0,
        }

    @property
    def is_latent(self) -> bool:
        """Whether attention is over latents (MLA)."""
        return self.kv_lora_rank > 0

    @property
    def has_q_lora(self) -> bool:
        """Whether queries are made from a latent of their own."""
        return self.q_lora_rank > 0

    @property
    def qk_rope_head_dim(self) -> int:
        """Number of rotated elements of a head."""
        return self.rotary_embedding_dim or self.head_size

    @property
    def value_size(self) -> int:
        """Size of a head's value."""
        return self.v_head_dim or self.head_size

    @property
    def caches(self) -> tuple[str, ...]:
        """Names of a layer's cache tensors. With latent attention, keys and values are one tensor."""
        return ("key",) if self.is_latent else ("key", "value")

    @property
    def cache_head_size(self) -> int:
        """Number of elements that a cache tensor holds of a token and key/value head: with latent attention, the latent and the
        rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim if self.is_latent else self.head_size

    def cache_slots(self, positions: int) -> int:
        """Return the number of cache slots that `positions` tokens need: with sinks, one more."""
        return positions + self.attention_sinks

    @property
    def trained_length(self) -> int:
        """Longest text in training, in positions, before rotary scaling."""
        scaling = self.rotary_scaling or {}
        # Dynamic scaling counts from the model's positions, whatever else its dictionary holds (transformers 5).
        original = None if scaling.get("rope_type") == "dynamic" else scaling.get("original_max_position_embeddings")
        return int(original or self.max_position_embeddings)

    def rotary_depends_on_length(self, length: int) -> bool:
        """Whether a text of up to `length` positions may need other rotary frequencies than a short text."""
        kind = (self.rotary_scaling or {}).get("rope_type")
        return kind in ("longrope", "dynamic") and length > self.trained_length

    @property
    def max_positions(self) -> int:
        """Largest number of positions: max_position_embeddings, or the trained length times the rotary factor if that is more."""
        scaling = self.rotary_scaling or {}
        stretched = 0
        if scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
            stretched = int(self.trained_length * float(scaling.get("factor") or 1.0))
        return max(self.max_position_embeddings, stretched)

    def has_rotary(self, layer: int) -> bool:
        """Whether a layer (global number) has rotary embedding."""
        return self.rotary_layers is None or self.rotary_layers[layer]

    def has_window(self, layer: int) -> bool:
        """Whether a layer (global number) has the window."""
        return self.sliding_window is not None and (self.window_layers is None or self.window_layers[layer])

    def scales_queries(self, layer: int) -> bool:
        """Whether a layer (global number) scales its queries by position."""
        return self.query_scale_beta is not None and (self.query_scale_floor is None or not self.has_rotary(layer))

    def kv_heads_per_rank(self, tp: int) -> int:
        """Return max(K / tp, 1). With more ranks than key/value heads, tp / K ranks hold each head."""
        return max(self.num_key_value_heads // tp, 1)

    def padded_vocab_size(self, tp: int) -> int:
        """Return ceil(V / tp) * tp, as TensorRT-LLM's `pad_vocab_size`."""
        return -(-self.vocab_size // tp) * tp
