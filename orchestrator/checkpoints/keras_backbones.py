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
from orchestrator.checkpoints import keras_configs as configs
from orchestrator.checkpoints.kernels import Kind


class Rule(NamedTuple):
    """Meaning of a dataset."""

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
    tied: bool | None = None
    """Whether the head is the embedding; None: the config or the weights tell."""
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

    def hugging_face_config(self, fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return config.json of the same model without tie_word_embeddings, and warnings.

        Raises SourceCorruptError, ArchitectureError.
        """
        unknown = sorted(fields.keys() - _FIELDS.keys() - self.read - _PASSED_OVER)
        if unknown:
            raise ArchitectureError(
                f"{where} has fields that are not known: {', '.join(abbreviated(name, 40) for name in unknown[:5])}",
                "The model may depend on them: KerasHub is newer than the reader.",
            )
        for name in _FIELDS:
            value = fields.get(name)
            if type(value) is not int or not 0 < value < (2**16 if name == "num_layers" else 2**40):
                raise SourceCorruptError(f"{where}: {name} is {abbreviated(repr(value), 40)}, not a positive number")
        try:
            made = {key: fields[name] for name, key in _FIELDS.items()} | self.config(fields)
        except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
            raise SourceCorruptError(f"{where} lacks a field or holds one of another type: {error}") from None
        longest = self.context(fields)
        made |= {"rms_norm_eps": fields.get("layer_norm_epsilon", 1e-6), "max_position_embeddings": longest}
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
_LLAMA = Backbone(
    "llama_transformer_decoder", "llama_layer_norm", _LAYER, configs.llama, read=_LLAMA_FIELDS, context=configs.llama_context
)
_GEMMA = Backbone(
    "gemma_decoder_block", "rms_normalization", _GEMMA1_LAYER, configs.gemma, "decoder_block", _GEMMA_FIELDS, tied=True
)
_GEMMA2 = Backbone(
    "gemma_decoder_block", "rms_normalization", _GEMMA_LAYER, configs.gemma2, "decoder_block", _GEMMA_FIELDS, tied=True
)
_BACKBONES: dict[str, Backbone] = {
    "LlamaBackbone": _LLAMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": Backbone(
        "mistral_transformer_decoder",
        "mistral_layer_normalization",
        _LAYER,
        configs.mistral,
        read=_ROPE | {"sliding_window", "head_dim"},
        tied=False,
        context=lambda fields: 32768,
    ),
    "QwenBackbone": Backbone(
        "qwen_transformer_decoder",
        "qwen_layer_norm",
        {**_LAYER, **_BIASES},
        configs.qwen2,
        read=_ROPE | {"use_sliding_window_attention", "sliding_window_size"},
        context=lambda fields: 32768,
    ),
    "Qwen3Backbone": Backbone(
        "qwen3_transformer_decoder",
        "qwen3_layer_norm",
        {**_LAYER, **_HEAD_NORMS},
        configs.qwen3,
        read=_ROPE | {"head_dim", "sliding_window_size"},
        context=lambda fields: 32768,
    ),
    "GemmaBackbone": _GEMMA,
    "Gemma3Backbone": Backbone(
        "gemma3_decoder_block",
        "rms_normalization",
        _GEMMA_LAYER,
        configs.gemma3,
        "decoder_block",
        _GEMMA3_FIELDS,
        tied=True,
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
