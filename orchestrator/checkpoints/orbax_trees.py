"""Parameter trees that Orbax checkpoints hold: which array is which of Hugging Face's tensors.

MaxText: `decoder/layers/...` with the layers stacked along axis 1 (param_scan_axis), or `decoder/layers_N/...`. Source: MaxText's
checkpoint_conversion/utils/param_mapping.py and llama_or_mistral_ckpt.py. Gemma in Flax: `transformer/layer_N/...`. Source:
MaxText's convert_gemma_chkpt.py and Flax's examples/gemma.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator.base.errors import ArchitectureError, SourceCorruptError, abbreviated
from orchestrator.checkpoints.kernels import Kind

Shape = tuple[int, ...]


class Part(NamedTuple):
    """Part of an array that is a tensor."""

    name: str
    """Hugging Face's name."""
    kind: Kind
    fixed: tuple[tuple[int, int], ...] = ()
    """Axis and index of the part."""
    paired_rows: int = 0
    factor: float = 1.0
    divisor: float = 1.0
    add: float = 0.0


class Rule(NamedTuple):
    """How an array of a layer is stored."""

    name: str
    """Hugging Face's name within a layer, or in the model."""
    kind: Kind
    paired: bool = False
    """Whether neighbours of a head are rotated together: the rows of transformers' halves alternate."""
    factor: float = 1.0
    divisor: float = 1.0
    add: float = 0.0


@dataclass(frozen=True)
class Tree:
    """A parameter tree of a model."""

    sizes: Mapping[str, int]
    """Sizes of config.json."""
    rules: Callable[[str, Shape], Iterator[Part]]
    """Yields the parts of the array at a path."""
    prefix: re.Pattern[str]
    """Beginning of the names of parameters. Other arrays are not of the model."""
    warnings: tuple[str, ...] = ()

    def parameter(self, name: str) -> str | None:
        """Return the path of a parameter, parts joined by "/"; None: the array is no parameter."""
        path = name.replace(".", "/")
        found = self.prefix.match(path)
        return None if found is None else path[found.end() :]

    def parts(self, path: str, shape: Shape) -> Iterator[Part]:
        """Yield the tensors that an array holds. Raises SourceCorruptError, ArchitectureError."""
        return self.rules(path, shape)

    def most_rows(self, name: str) -> int:
        """Return the rows of a tensor without the padding of the vocabulary."""
        is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
        return self.sizes["vocab_size"] if is_vocabulary else 2**62


def tree_of(config: Mapping[str, Any], names: Collection[str], where: str) -> Tree:
    """Return the tree that the arrays `names` are of. Raises ArchitectureError, SourceCorruptError."""
    paths = [name.replace(".", "/") for name in names]
    architecture = (config.get("architectures") or ["unknown"])[0]
    if any("decoder/" in path and "token_embedder" not in path for path in paths):
        if architecture not in _MAXTEXT:
            raise ArchitectureError(
                f"{where}: MaxText's {abbreviated(str(architecture), 60)} is not read", f"Read are {', '.join(_MAXTEXT)}."
            )
        return _maxtext(config, architecture, where)
    if any(re.search(r"(^|/)layer_\d+/attn/", path) for path in paths):
        if architecture not in _FLAX:
            raise ArchitectureError(
                f"{where}: {abbreviated(str(architecture), 60)} in Flax is not read", f"Read are {', '.join(_FLAX)}."
            )
        return _flax_gemma(config, architecture, where)
    shown = ", ".join(abbreviated(name, 60) for name in sorted(names)[:3])
    raise ArchitectureError(f"{where} holds arrays of no known tree: {shown}", "Trees of MaxText and of Gemma in Flax are read.")


_HEADS = {
    "GemmaForCausalLM": (16, 256),
    "Gemma2ForCausalLM": (4, 256),
    "Gemma3ForCausalLM": (4, 256),
    "Qwen3ForCausalLM": (32, 128),
}
"""num_key_value_heads and head_dim of a config.json without them, as in transformers' config classes."""


def _sizes(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the sizes of config.json that tell how arrays are read. Raises SourceCorruptError."""

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value < 2**40:
            raise SourceCorruptError(f"{where}/config.json: {key} is {abbreviated(repr(value), 40)}, not a positive number")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    shared, size = _HEADS.get(config["architectures"][0], (heads, max(1, hidden // heads)))
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": number("num_key_value_heads", shared),
        "head_dim": number("head_dim", size),
        "num_hidden_layers": number("num_hidden_layers"),
        "vocab_size": number("vocab_size", 2**40),
    }


_ATTENTION = {
    "query/kernel": Rule("self_attn.q_proj.weight", Kind.OUT_OF_FIRST),
    "key/kernel": Rule("self_attn.k_proj.weight", Kind.OUT_OF_FIRST),
    "value/kernel": Rule("self_attn.v_proj.weight", Kind.OUT_OF_FIRST),
    "out/kernel": Rule("self_attn.o_proj.weight", Kind.INTO_LAST),
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
    """What MaxText's layers of an architecture are."""

    norms: Mapping[str, Rule]
    scaled_query: bool = False
    """Whether 1/sqrt(head_dim) is within the query kernel."""
    offset: bool = False
    """Whether norms are stored with 1 added, and the embedding multiplied with sqrt(hidden)."""
    pairs: bool = False
    """Whether a layer of MaxText is two: local, then global."""
    rounded: bool = False
    """Whether sqrt(hidden) was rounded to bfloat16."""


_MAXTEXT: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(_PRE_NORMS, scaled_query=True),
    "MistralForCausalLM": _Family(_PRE_NORMS, scaled_query=True),
    "Qwen3ForCausalLM": _Family(_PRE_NORMS),
    "GemmaForCausalLM": _Family(_GEMMA_NORMS, scaled_query=True, offset=True),
    "Gemma2ForCausalLM": _Family(_SANDWICH, scaled_query=True, offset=True, pairs=True),
    "Gemma3ForCausalLM": _Family(_SANDWICH, offset=True, rounded=True),
}


def _maxtext(config: Mapping[str, Any], architecture: str, where: str) -> Tree:
    family, sizes = _MAXTEXT[architecture], _sizes(config, where)
    layers, head, hidden = sizes["num_hidden_layers"], sizes["head_dim"], sizes["hidden_size"]
    rotary = config.get("rope_scaling") or config.get("rope_parameters") or {}
    interleaved = rotary.get("rope_type", rotary.get("type")) == "llama3"  # MaxText rotates pairs only for Llama 3.1 and later
    table = _layer_table(family, head, interleaved)
    top = {path: _offset(rule, family, hidden) for path, rule in _TOP.items()}

    def parts(path: str, shape: Shape) -> Iterator[Part]:
        if path in top:
            yield _part(top[path], top[path].name, (), head)
            return
        place = _layers_of(path, layers, family.pairs)
        rule = table.get(place.inner) if place else None
        if place is None or rule is None:
            yield Part(path, Kind.COPY)  # without a rule: the weight map refuses it
        elif len(place.layers) == 1 and not place.stacked:
            yield _part(rule, f"model.layers.{place.layers[0]}.{rule.name}", (), head)
        else:
            axis = _scan_axis(shape, len(place.layers), f"{where}: {path}")
            for number, layer in enumerate(place.layers):
                yield _part(rule, f"model.layers.{layer}.{rule.name}", ((axis, number),), head)

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


def _part(rule: Rule, name: str, fixed: tuple[tuple[int, int], ...], head: int) -> Part:
    return Part(name, rule.kind, fixed, head if rule.paired else 0, rule.factor, rule.divisor, rule.add)


def _scan_axis(shape: Shape, layers: int, where: str) -> int:
    """Return the axis of the layers: 1, MaxText's param_scan_axis, or another of their number. Raises SourceCorruptError."""
    found = [axis for axis in (1, 0, 2, 3) if axis < len(shape) and shape[axis] == layers]
    if not found:
        raise SourceCorruptError(
            f"{where} is {list(shape)}: no axis has the {layers} layers of config.json",
            "config.json and the checkpoint belong to different models.",
        )
    return found[0]


_FLAX = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
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


def _flax_gemma(config: Mapping[str, Any], architecture: str, where: str) -> Tree:
    sizes = _sizes(config, where)
    hidden = sizes["hidden_size"]

    def parts(path: str, shape: Shape) -> Iterator[Part]:
        if path in _FLAX_TOP:
            yield _part(_FLAX_TOP[path], _FLAX_TOP[path].name, (), 0)
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
