"""MaxText's parameters: `decoder/layers/...` with the layers stacked along axis 1 (param_scan_axis), or `decoder/layers_N/...`.

Source: MaxText's checkpoint_conversion/utils/param_mapping.py and llama_or_mistral_ckpt.py.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orchestrator.base.errors import SourceCorruptError
from orchestrator.checkpoints.kernels import Kind
from orchestrator.checkpoints.orbax_parts import Part, Rule, Shape, Tree, part_of, sizes_of

_ATTENTION = {
    "query/kernel": Rule("self_attn.q_proj.weight", Kind.OUT_OF_FIRST),
    "key/kernel": Rule("self_attn.k_proj.weight", Kind.OUT_OF_FIRST),
    "value/kernel": Rule("self_attn.v_proj.weight", Kind.OUT_OF_FIRST),
    "out/kernel": Rule("self_attn.o_proj.weight", Kind.INTO_LAST),
    "query/bias": Rule("self_attn.q_proj.bias", Kind.FLAT),
    "key/bias": Rule("self_attn.k_proj.bias", Kind.FLAT),
    "value/bias": Rule("self_attn.v_proj.bias", Kind.FLAT),
    "query_norm/scale": Rule("self_attn.q_norm.weight", Kind.COPY),
    "key_norm/scale": Rule("self_attn.k_norm.weight", Kind.COPY),
}
_MLP = {
    "wi_0/kernel": Rule("mlp.gate_proj.weight", Kind.OUT_OF_FIRST),
    "wi_1/kernel": Rule("mlp.up_proj.weight", Kind.OUT_OF_FIRST),
    "wo/kernel": Rule("mlp.down_proj.weight", Kind.INTO_LAST),
}
_TOP = {
    "token_embedder/embedding": Rule("model.embed_tokens.weight", Kind.COPY),
    "decoder/decoder_norm/scale": Rule("model.norm.weight", Kind.COPY),
    "decoder/logits_dense/kernel": Rule("lm_head.weight", Kind.OUT_OF_FIRST),
}
_PRE_NORMS = {
    "pre_self_attention_layer_norm/scale": Rule("input_layernorm.weight", Kind.COPY),
    "post_self_attention_layer_norm/scale": Rule("post_attention_layernorm.weight", Kind.COPY),
}
_GEMMA_NORMS = {
    "pre_self_attention_norm/scale": Rule("input_layernorm.weight", Kind.COPY),
    "pre_ffw_norm/scale": Rule("post_attention_layernorm.weight", Kind.COPY),
}
_SANDWICH = {
    "pre_self_attention_norm/scale": Rule("input_layernorm.weight", Kind.COPY),
    "post_self_attention_norm/scale": Rule("post_attention_layernorm.weight", Kind.COPY),
    "pre_ffw_norm/scale": Rule("pre_feedforward_layernorm.weight", Kind.COPY),
    "post_ffw_norm/scale": Rule("post_feedforward_layernorm.weight", Kind.COPY),
}


class _Family(NamedTuple):
    """Layers of an architecture in MaxText's tree."""

    norms: Mapping[str, Rule]
    scaled_query: bool = False
    """Whether 1/sqrt(head_dim) is within the query kernel."""
    offset: bool = False
    """Whether norms are stored with 1 added, and the embedding multiplied with sqrt(hidden)."""
    pairs: bool = False
    """Whether a layer of MaxText is two: local, then global."""
    rounded: bool = False
    """Whether sqrt(hidden) was rounded to bfloat16."""


MAXTEXT: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(_PRE_NORMS, scaled_query=True),
    "MistralForCausalLM": _Family(_PRE_NORMS, scaled_query=True),
    "Qwen2ForCausalLM": _Family(_PRE_NORMS),
    "Qwen3ForCausalLM": _Family(_PRE_NORMS),
    "GemmaForCausalLM": _Family(_GEMMA_NORMS, scaled_query=True, offset=True),
    "Gemma2ForCausalLM": _Family(_SANDWICH, scaled_query=True, offset=True, pairs=True),
    "Gemma3ForCausalLM": _Family(_SANDWICH, offset=True, rounded=True),
}


def maxtext(config: Mapping[str, Any], architecture: str, where: str) -> Tree:
    """Return the tree of a model of MaxText. Raises SourceCorruptError."""
    family, sizes = MAXTEXT[architecture], sizes_of(config, where)
    layers, head, hidden = sizes["num_hidden_layers"], sizes["head_dim"], sizes["hidden_size"]
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    interleaved = rotary.get("rope_type", rotary.get("type")) == "llama3"  # MaxText rotates pairs only for Llama 3.1 and later
    table = _layer_table(family, head, interleaved)
    top = {path: _offset(rule, family, hidden) for path, rule in _TOP.items()}

    def parts(path: str, shape: Shape) -> Iterator[Part]:
        if path in top:
            yield part_of(top[path], top[path].name)
            return
        place = _layers_of(path, layers, family.pairs)
        rule = table.get(place.inner) if place else None
        if place is None or rule is None:
            yield Part(path, Kind.COPY)  # without a rule: the weight map refuses it
        elif len(place.layers) == 1 and not place.stacked:
            yield part_of(rule, f"model.layers.{place.layers[0]}.{rule.name}", head=head)
        else:
            axis = _scan_axis(shape, len(place.layers), f"{where}: {path}")
            for number, layer in enumerate(place.layers):
                yield part_of(rule, f"model.layers.{layer}.{rule.name}", ((axis, number),), head)

    return Tree(sizes, parts, re.compile(r"(params/)+"))


class _Place(NamedTuple):
    """Place of an array among the layers."""

    layers: range
    """Layers of the model that it holds."""
    stacked: bool
    """Whether they are an axis."""
    inner: str
    """Path within a layer."""


def _layers_of(path: str, layers: int, pairs: bool) -> _Place | None:
    """Return the place of an array of MaxText's decoder; None: it is in no layer.

    Gemma 3 repeats blocks of six layers, stacked by their number in the block, and has the rest behind them.
    """
    if found := re.fullmatch(r"decoder/layers/layers_([0-5])/(.+)", path):
        return _Place(range(int(found[1]), layers - layers % 6, 6), True, found[2])
    if found := re.fullmatch(r"decoder/layers_remainder/layers_([0-5])/(.+)", path):
        first = layers - layers % 6 + int(found[1])
        return _Place(range(first, first + 1), False, found[2])
    found = re.fullmatch(r"decoder/layers(?:_(\d{1,6}))?/(.+)", path)
    if found is None:
        return None
    inner, step, first = found[2], 1, 0
    if pairs:
        half = re.search(r"_(local|global)(?=/)", inner)
        if half is None:
            return None
        inner, step, first = inner.replace(half[0], "", 1), 2, int(half[1] == "global")
    if found[1] is not None:
        first += int(found[1]) * step
        return _Place(range(first, first + 1), False, inner)
    return _Place(range(first, layers, step), True, inner)


def _layer_table(family: _Family, head: int, interleaved: bool) -> dict[str, Rule]:
    """Return the arrays of a layer by path."""
    table = {f"self_attention/{path}": rule for path, rule in _ATTENTION.items()}
    table |= {f"mlp/{path}": rule for path, rule in _MLP.items()}
    table |= family.norms
    for path, rule in table.items():
        if path.endswith("scale") and family.offset:
            table[path] = rule._replace(add=-1.0)
        if path == "self_attention/query/kernel":
            scale = math.sqrt(head) if family.scaled_query else 1.0
            table[path] = rule._replace(paired=interleaved, factor=scale)
        if path == "self_attention/key/kernel":
            table[path] = rule._replace(paired=interleaved)
    return table


def _offset(rule: Rule, family: _Family, hidden: int) -> Rule:
    """Return a rule outside of the layers, with what Gemma's arithmetic adds."""
    if not family.offset:
        return rule
    if "norm" in rule.name:
        return rule._replace(add=-1.0)
    return rule._replace(divisor=_as_bfloat16(math.sqrt(hidden)) if family.rounded else math.sqrt(hidden))


def _as_bfloat16(value: float) -> float:
    """Round to bfloat16, to nearest even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    rounded: float = struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0]
    return rounded


def _scan_axis(shape: Shape, layers: int, where: str) -> int:
    """Return the axis of the layers: 1, MaxText's param_scan_axis, or another of their number. Raises SourceCorruptError."""
    found = [axis for axis in (1, 0, 2, 3) if axis < len(shape) and shape[axis] == layers]
    if not found:
        raise SourceCorruptError(
            f"{where} is {list(shape)}: no axis has the {layers} layers of config.json",
            "config.json and the checkpoint belong to different models.",
        )
    return found[0]
