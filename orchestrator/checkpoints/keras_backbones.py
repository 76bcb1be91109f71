"""KerasHub's backbones: which dataset is which of Hugging Face's tensors, and config.json of the same model.

Paths are those that Keras writes: layers/<class name in snake case>[_<number>]/<attributes>/vars/<number>. Numbers count the
layers of a class in the order in which they were made; none is 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestrator.base.errors import ArchitectureError, SourceCorruptError, abbreviated
from orchestrator.checkpoints.kernels import Kind


class Rule(NamedTuple):
    """What a dataset is."""

    name: str
    """Hugging Face's name."""
    kind: Kind
    layer: int | None
    """Number of the decoder layer; None: outside of the layers."""


_Table = Mapping[str, tuple[str, Kind]]
_LAYER: _Table = {
    "_self_attention_layer/_query_dense/vars/0": ("self_attn.q_proj.weight", Kind.OUT_OF_FIRST),
    "_self_attention_layer/_key_dense/vars/0": ("self_attn.k_proj.weight", Kind.OUT_OF_FIRST),
    "_self_attention_layer/_value_dense/vars/0": ("self_attn.v_proj.weight", Kind.OUT_OF_FIRST),
    "_self_attention_layer/_output_dense/vars/0": ("self_attn.o_proj.weight", Kind.INTO_LAST),
    "_feedforward_gate_dense/vars/0": ("mlp.gate_proj.weight", Kind.OUT_OF_FIRST),
    "_feedforward_intermediate_dense/vars/0": ("mlp.up_proj.weight", Kind.OUT_OF_FIRST),
    "_feedforward_output_dense/vars/0": ("mlp.down_proj.weight", Kind.INTO_LAST),
    "_self_attention_layernorm/vars/0": ("input_layernorm.weight", Kind.COPY),
    "_feedforward_layernorm/vars/0": ("post_attention_layernorm.weight", Kind.COPY),
}
_BIASES: _Table = {
    f"_self_attention_layer/_{name}_dense/vars/1": (f"self_attn.{name[0]}_proj.bias", Kind.FLAT)
    for name in ("query", "key", "value")
}
_HEAD_NORMS: _Table = {
    f"_self_attention_layer/_{name}_dense_layer_norm/vars/0": (f"self_attn.{name[0]}_norm.weight", Kind.COPY)
    for name in ("query", "key")
}
_GEMMA_LAYER: _Table = {
    "attention/query_dense/vars/0": ("self_attn.q_proj.weight", Kind.HEADS),
    "attention/key_dense/vars/0": ("self_attn.k_proj.weight", Kind.HEADS),
    "attention/value_dense/vars/0": ("self_attn.v_proj.weight", Kind.HEADS),
    "attention/output_dense/vars/0": ("self_attn.o_proj.weight", Kind.INTO_LAST),
    "attention/query_norm/vars/0": ("self_attn.q_norm.weight", Kind.COPY),
    "attention/key_norm/vars/0": ("self_attn.k_norm.weight", Kind.COPY),
    "gating_ffw/vars/0": ("mlp.gate_proj.weight", Kind.OUT_OF_FIRST),
    "gating_ffw_2/vars/0": ("mlp.up_proj.weight", Kind.OUT_OF_FIRST),
    "ffw_linear/vars/0": ("mlp.down_proj.weight", Kind.INTO_LAST),
    "pre_attention_norm/vars/0": ("input_layernorm.weight", Kind.COPY),
    "post_attention_norm/vars/0": ("post_attention_layernorm.weight", Kind.COPY),
    "pre_ffw_norm/vars/0": ("pre_feedforward_layernorm.weight", Kind.COPY),
    "post_ffw_norm/vars/0": ("post_feedforward_layernorm.weight", Kind.COPY),
}
_GEMMA1_LAYER: _Table = {**_GEMMA_LAYER, "pre_ffw_norm/vars/0": ("post_attention_layernorm.weight", Kind.COPY)}
_EMBEDDING: _Table = {
    "layers/reversible_embedding/vars/0": ("model.embed_tokens.weight", Kind.COPY),
    "layers/reversible_embedding/vars/1": ("lm_head.weight", Kind.OUT_OF_FIRST),
}


@dataclass(frozen=True)
class Backbone:
    """A backbone that is read: its layers' datasets and its config."""

    layers: str
    """Container of a decoder layer, without its number."""
    final_norm: str
    """Container of the last norm."""
    layer: _Table
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Fields of the backbone -> config.json's keys, without those that all have."""
    layer_label: str = "transformer_layer"
    """Name of a decoder layer in the model, without its number."""
    read: frozenset[str] = field(default_factory=frozenset)
    """Fields that `config` reads, or that must be at a value that it checks, besides those that all have."""
    context: Callable[[Mapping[str, Any]], int] = lambda fields: 8192
    """Longest context of the family's models, which KerasHub does not record."""

    def rule(self, path: str) -> Rule | None:
        """Return what the dataset at `path` is; None: it is not known."""
        if path in _EMBEDDING:
            return Rule(*_EMBEDDING[path], None)
        if path == f"layers/{self.final_norm}/vars/0":
            return Rule("model.norm.weight", Kind.COPY, None)
        found = re.fullmatch(rf"layers/{self.layers}(?:_(\d{{1,6}}))?/(.+)", path)
        if found is None or found[2] not in self.layer:
            return None
        layer, (name, kind) = int(found[1] or 0), self.layer[found[2]]
        return Rule(f"model.layers.{layer}.{name}", kind, layer)

    def hugging_face_config(self, fields: Mapping[str, Any], *, tied: bool, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return config.json of the same model, and warnings. Raises SourceCorruptError, ArchitectureError."""
        unknown = sorted(fields.keys() - _FIELDS.keys() - self.read - _PASSED_OVER)
        if unknown:
            raise ArchitectureError(
                f"{where} has fields that are not known: {', '.join(abbreviated(name, 40) for name in unknown[:5])}",
                "The model may depend on them: KerasHub is newer than the reader.",
            )
        for name in _FIELDS:
            value = fields.get(name)
            if type(value) is not int or not 0 < value < 2**40:
                raise SourceCorruptError(f"{where}: {name} is {abbreviated(repr(value), 40)}, not a positive number")
        try:
            made = {key: fields[name] for name, key in _FIELDS.items()} | self.config(fields)
        except (TypeError, KeyError, ZeroDivisionError) as error:
            raise SourceCorruptError(f"{where} lacks a field or holds one of another type: {error}") from None
        longest = self.context(fields)
        made |= {
            "rms_norm_eps": fields.get("layer_norm_epsilon", 1e-6),
            "max_position_embeddings": longest,
            "tie_word_embeddings": tied,
        }
        warning = f"KerasHub does not record the longest context: {longest} tokens are assumed, as in the family's first models"
        return made, (warning,) if fields.get("query_head_dim_normalize", True) else (warning, _QUERY_SCALE)


_FIELDS = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
}
"""Field that every backbone has -> config.json's key."""
_PASSED_OVER = frozenset({"name", "trainable", "dtype", "dropout", "layer_norm_epsilon", "tie_word_embeddings"})
"""Fields that the weights of a built model do not depend on, or that are read elsewhere."""


_QUERY_SCALE = (
    "query_head_dim_normalize is false: queries are scaled by 1/sqrt(hidden_dim / num_query_heads), as Gemma 2 27B was trained; "
    "KerasHub up to 0.32 records this but computes with 1/sqrt(head_dim)"
)


def _llama(fields: Mapping[str, Any]) -> dict[str, Any]:
    factor, linear = fields.get("rope_frequency_adjustment_factor"), fields.get("rope_position_scaling_factor", 1.0)
    scaling: dict[str, Any] | None = None
    if factor is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": fields["rope_low_freq_factor"],
            "high_freq_factor": fields["rope_high_freq_factor"],
            "original_max_position_embeddings": fields["rope_pretraining_sequence_length"],
        }
        if linear != 1.0:
            raise ArchitectureError("rope_position_scaling_factor beside rope_frequency_adjustment_factor is not supported")
    elif linear != 1.0:
        scaling = _linear(linear)
    return {
        **_named("LlamaForCausalLM", "llama"),
        "hidden_act": "silu",
        "rope_theta": float(fields["rope_max_wavelength"]),
        "rope_scaling": scaling,
    }


def _llama_context(fields: Mapping[str, Any]) -> int:
    if fields.get("rope_frequency_adjustment_factor"):
        return 131072
    return 8192 if float(fields["rope_max_wavelength"]) == 500000.0 else 4096


def _mistral(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_named("MistralForCausalLM", "mistral"),
        "hidden_act": "silu",
        **_rotary(fields),
        **({"head_dim": fields["head_dim"]} if fields.get("head_dim") else {}),
        "sliding_window": fields.get("sliding_window"),
    }


def _qwen2(fields: Mapping[str, Any]) -> dict[str, Any]:
    """KerasHub has the window in every layer."""
    window = bool(fields.get("use_sliding_window_attention"))
    return {
        **_named("Qwen2ForCausalLM", "qwen2"),
        "hidden_act": "silu",
        **_rotary(fields),
        **_window(fields.get("sliding_window_size") if window else None),
    }


def _qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_named("Qwen3ForCausalLM", "qwen3"),
        "hidden_act": "silu",
        **_rotary(fields),
        "head_dim": fields["head_dim"] or fields["hidden_dim"] // fields["num_query_heads"],
        **_window(fields.get("sliding_window_size") or None),
    }


def _window(size: int | None) -> dict[str, Any]:
    return {} if size is None else {"use_sliding_window": True, "sliding_window": size, "max_window_layers": 0}


def _gemma(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 1. `intermediate_dim` counts gate and up."""
    if not fields.get("query_head_dim_normalize", True):
        raise ArchitectureError("query_head_dim_normalize: false is not known of Gemma 1")
    return {
        **_named("GemmaForCausalLM", "gemma"),
        "hidden_act": "gelu_pytorch_tanh",
        "head_dim": fields["head_dim"],
        "intermediate_size": fields["intermediate_dim"] // 2,
        "rope_theta": 10000.0,
    }


def _gemma2(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_named("Gemma2ForCausalLM", "gemma2"),
        "intermediate_size": fields["intermediate_dim"] // 2,
        "rope_theta": 10000.0,
        **_later_gemma(fields, lambda layer: layer % 2 == 0),
        "attn_logit_softcapping": fields["attention_logit_soft_cap"],
    }


def _gemma3(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("vision_encoder", "is_embedding_model", "use_bidirectional_attention", "attention_logit_soft_cap"):
        if fields.get(name):
            raise ArchitectureError(f"a Gemma 3 with {name} is not read", "Text models without it are.")
    for name in ("use_query_key_norm", "use_post_ffw_norm", "use_post_attention_norm"):
        if not fields.get(name):
            raise ArchitectureError(f"a Gemma 3 without {name} is not known")
    scales = {name: fields.get(f"{name}_rope_scaling_factor", 1.0) for name in ("global", "local")}
    if scales["local"] != 1.0:
        raise ArchitectureError(f"local_rope_scaling_factor {scales['local']} is not known of Gemma 3")
    full = {"rope_type": "default"} if scales["global"] == 1.0 else _linear(scales["global"])
    return {
        **_named("Gemma3ForCausalLM", "gemma3_text"),
        **_later_gemma(fields, lambda layer: layer % 6 < 5),
        "rope_parameters": {
            "full_attention": {**full, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


def _later_gemma(fields: Mapping[str, Any], has_window: Callable[[int], bool]) -> dict[str, Any]:
    """Return keys of Gemma 2 and 3. The scale of queries is 1/sqrt(head_dim), or 1/sqrt(hidden_dim / heads)."""
    per_head = fields["query_head_dim_normalize"]
    window = fields["use_sliding_window_attention"]
    kinds = ["sliding_attention" if window and has_window(layer) else "full_attention" for layer in range(fields["num_layers"])]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": fields["head_dim"],
        "query_pre_attn_scalar": fields["head_dim"] if per_head else fields["hidden_dim"] // fields["num_query_heads"],
        "final_logit_softcapping": fields["final_logit_soft_cap"],
        "sliding_window": fields["sliding_window_size"],
        "layer_types": kinds,
    }


def _named(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    factor = fields.get("rope_scaling_factor", 1.0)
    return {"rope_theta": float(fields["rope_max_wavelength"]), "rope_scaling": None if factor == 1.0 else _linear(factor)}


def _linear(factor: float) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": float(factor)}


_ROPE = frozenset({"rope_max_wavelength", "rope_scaling_factor"})
_LLAMA_FIELDS = frozenset({
    "rope_max_wavelength", "rope_position_scaling_factor", "rope_frequency_adjustment_factor", "rope_low_freq_factor",
    "rope_high_freq_factor", "rope_pretraining_sequence_length",
})  # fmt: skip
_GEMMA_FIELDS = frozenset({
    "head_dim", "query_head_dim_normalize", "use_post_ffw_norm", "use_post_attention_norm", "final_logit_soft_cap",
    "attention_logit_soft_cap", "sliding_window_size", "use_sliding_window_attention",
})  # fmt: skip
_GEMMA3_FIELDS = _GEMMA_FIELDS | {
    "image_size", "use_query_key_norm", "local_rope_scaling_factor", "global_rope_scaling_factor", "vision_encoder",
    "use_bidirectional_attention", "is_embedding_model", "pooling_intermediate_dim", "embedding_dim",
}  # fmt: skip
_LLAMA = Backbone("llama_transformer_decoder", "llama_layer_norm", _LAYER, _llama, read=_LLAMA_FIELDS, context=_llama_context)
_GEMMA = Backbone("gemma_decoder_block", "rms_normalization", _GEMMA1_LAYER, _gemma, "decoder_block", _GEMMA_FIELDS)
_GEMMA2 = Backbone("gemma_decoder_block", "rms_normalization", _GEMMA_LAYER, _gemma2, "decoder_block", _GEMMA_FIELDS)
_BACKBONES: dict[str, Backbone] = {
    "LlamaBackbone": _LLAMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": Backbone(
        "mistral_transformer_decoder",
        "mistral_layer_normalization",
        _LAYER,
        _mistral,
        read=_ROPE | {"sliding_window", "head_dim"},
        context=lambda fields: 32768,
    ),
    "QwenBackbone": Backbone(
        "qwen_transformer_decoder",
        "qwen_layer_norm",
        {**_LAYER, **_BIASES},
        _qwen2,
        read=_ROPE | {"use_sliding_window_attention", "sliding_window_size"},
        context=lambda fields: 32768,
    ),
    "Qwen3Backbone": Backbone(
        "qwen3_transformer_decoder",
        "qwen3_layer_norm",
        {**_LAYER, **_HEAD_NORMS},
        _qwen3,
        read=_ROPE | {"head_dim", "sliding_window_size"},
        context=lambda fields: 32768,
    ),
    "GemmaBackbone": _GEMMA,
    "Gemma3Backbone": Backbone(
        "gemma3_decoder_block",
        "rms_normalization",
        _GEMMA_LAYER,
        _gemma3,
        "decoder_block",
        _GEMMA3_FIELDS,
        context=lambda fields: 32768 if fields["num_layers"] == 26 else 131072,
    ),
}
"""Class name in config.json -> backbone. Gemma 1 and 2 share one."""


def backbone_of(class_name: str, fields: Mapping[str, Any], where: str) -> Backbone:
    """Return the backbone of a config. Raises ArchitectureError for one that is not read."""
    found = _BACKBONES.get(class_name)
    if found is None:
        raise ArchitectureError(
            f"{where} is of a {abbreviated(class_name, 60)}, which is not read",
            f"KerasHub's presets are read of {', '.join(_BACKBONES)}.",
        )
    if found is not _GEMMA:
        return found
    sandwich = {bool(fields.get(name)) for name in ("use_post_ffw_norm", "use_post_attention_norm")}
    if len(sandwich) > 1:
        raise ArchitectureError(f"{where}: Gemma has either both of use_post_ffw_norm and use_post_attention_norm, or none")
    return _GEMMA2 if sandwich == {True} else _GEMMA
