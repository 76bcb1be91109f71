"""Parameters of Gemma in Flax: `transformer/layer_N/...`. Source: MaxText's convert_gemma_chkpt.py and Flax's examples/gemma."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.base.errors import SourceCorruptError
from orchestrator.checkpoints.kernels import Kind
from orchestrator.checkpoints.orbax_parts import Part, Rule, Shape, Tree, part_of, sizes_of

FLAX = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
_FLAX_TOP = {
    "embedder/input_embedding": Rule("model.embed_tokens.weight", Kind.COPY),
    "final_norm/scale": Rule("model.norm.weight", Kind.COPY),
}
_FLAX_LAYER = {
    "attn/q_einsum/w": Rule("self_attn.q_proj.weight", Kind.HEADS),
    "attn/attn_vec_einsum/w": Rule("self_attn.o_proj.weight", Kind.INTO_LAST),
    "attn/_query_norm/scale": Rule("self_attn.q_norm.weight", Kind.COPY),
    "attn/_key_norm/scale": Rule("self_attn.k_norm.weight", Kind.COPY),
    "mlp/linear/w": Rule("mlp.down_proj.weight", Kind.INTO_LAST),
    "mlp/linear": Rule("mlp.down_proj.weight", Kind.INTO_LAST),
    "pre_attention_norm/scale": Rule("input_layernorm.weight", Kind.COPY),
    "post_attention_norm/scale": Rule("post_attention_layernorm.weight", Kind.COPY),
    "pre_ffw_norm/scale": Rule("pre_feedforward_layernorm.weight", Kind.COPY),
    "post_ffw_norm/scale": Rule("post_feedforward_layernorm.weight", Kind.COPY),
}
_FLAX_STACKED = {
    "attn/qkv_einsum/w": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn/kv_einsum/w": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp/gating_einsum/w": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp/gating_einsum": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
"""Arrays whose first axis counts tensors."""


def flax_gemma(config: Mapping[str, Any], architecture: str, where: str) -> Tree:
    """Return the tree of a Gemma. Raises SourceCorruptError."""
    sizes = sizes_of(config, where)
    hidden = sizes["hidden_size"]

    def parts(path: str, shape: Shape) -> Iterator[Part]:
        if path in _FLAX_TOP:
            yield part_of(_FLAX_TOP[path], _FLAX_TOP[path].name)
            return
        found = re.fullmatch(r"layer_(\d{1,6})/(.+)", path)
        inner = found[2] if found else ""
        prefix = f"model.layers.{int(found[1])}." if found else ""
        if inner in _FLAX_STACKED:
            names = _FLAX_STACKED[inner]
            if not shape or shape[0] != len(names):
                raise SourceCorruptError(f"{where}: {path} is {list(shape)}, {len(names)} tensors were expected on the first axis")
            for number, name in enumerate(names):
                kind = Kind.HEADS
                if inner.startswith("mlp"):  # [2, in, out]; Gemma 2 27B and Gemma 3 have [2, out, in]
                    kind = Kind.COPY if shape[-1] == hidden and shape[1] != hidden else Kind.OUT_OF_FIRST
                yield Part(prefix + name, kind, ((0, number),))
        elif inner in _FLAX_LAYER:
            rule = _FLAX_LAYER[inner]
            name = rule.name
            if architecture == "GemmaForCausalLM" and inner == "pre_ffw_norm/scale":
                name = "post_attention_layernorm.weight"
            yield Part(prefix + name, rule.kind)
        else:
            yield Part(path, Kind.COPY)  # without a rule: the weight map refuses it

    return Tree(sizes, parts, re.compile(r"(params/)*(transformer/)?(?=layer_\d|embedder/|final_norm/)"))
