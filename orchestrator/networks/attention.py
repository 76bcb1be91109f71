"""Grouped-query attention through the KV cache, with windows, caps on the scores, and norms of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.config import ModelConfig
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.kv_cache import update_cache
from orchestrator.networks.layers import linear, rms_norm, row_linear, scale, soft_cap, split_rms_norm, weightless_norm
from orchestrator.networks.shape import RankShape
from orchestrator.networks.sinks import with_sinks

_MASKED = -3.0e38


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Inputs of a layer's attention besides the hidden states."""

    layer: int
    """Layer number within the stage."""
    mask: str
    rotary: tuple[str, ...]
    """Inputs of RotaryEmbedding after the queries or keys."""
    query_scale: str | None = None
    """Factor of the queries by position, [batch, 1, tokens, 1]; None: they are not scaled."""
    has_values: bool = True
    """Whether values are projected, instead of being the keys before their norm."""


def causal_mask(graph: GraphWriter, position_ids: str, cache: str) -> str:
    """Add the causal mask, boolean [batch, 1, tokens, slots]: a token at position p attends to cache slots 0..p.

    Slot and position are the same number, so right padding needs no mask: the slot of a padding token comes after every real
    token, until a real token overwrites it.
    """
    length = graph.node("Shape", [cache], "num_slots", start=2, end=3)
    scalar = graph.node("Squeeze", [length, graph.constant("axis_0", [0])], "num_slots.scalar")
    slots = graph.node("Range", [graph.constant("zero", 0), scalar, graph.constant("one", 1)], "slots")
    positions = graph.node("Unsqueeze", [position_ids, graph.constant("axes_1_3", [1, 3])], "positions")
    return graph.node("LessOrEqual", [slots, positions], "mask.causal")


def window_mask(graph: GraphWriter, window: int) -> str:
    """Add the causal mask that is limited to the last `window` positions."""
    oldest = graph.node("Sub", ["positions", graph.constant("sliding_window", window)], "mask.oldest")
    return graph.node("And", ["mask.causal", graph.node("Greater", ["slots", oldest], "mask.recent")], "mask.window")


def chunk_mask(graph: GraphWriter, size: int) -> str:
    """Add the causal mask that is limited to the token's own chunk of `size` positions."""
    length = graph.constant("sliding_window", size)
    own, others = (graph.node("Div", [each, length], f"{each}.chunk") for each in ("positions", "slots"))
    return graph.node("And", ["mask.causal", graph.node("Equal", [others, own], "mask.chunk")], "mask.window")


def score_scale(config: ModelConfig) -> float:
    """Return the factor of the products of queries and keys."""
    return config.attention_scale if config.attention_scale is not None else float(config.head_size) ** -0.5


def attention(graph: GraphWriter, shape: RankShape, x: str, inputs: LayerInputs) -> str:
    """Add the attention of a layer. New keys and values are first scattered into the KV cache."""
    config, prefix = shape.config, f"transformer.layers.{inputs.layer}.attention"
    head, heads, kv_heads = config.head_size, shape.num_heads, shape.num_kv_heads
    widths = [heads * head, *[kv_heads * head] * (2 if inputs.has_values else 1)]
    qkv = linear(graph, shape, x, f"{prefix}.qkv", (sum(widths), config.hidden_size), bias=config.attn_bias)
    q, k, v = (f"{prefix}.{name}" for name in "qkv")
    graph.nodes("Split", [qkv, graph.constant(f"widths_{'_'.join(map(str, widths))}", widths)], [q, k, v][: len(widths)], axis=-1)
    if not inputs.has_values:
        graph.node("Identity", [k], v)
    queries = scaled_queries(graph, _normed_and_rotated(graph, shape, q, heads, f"{prefix}.q_layernorm", inputs.rotary), inputs)
    keys = _normed_and_rotated(graph, shape, k, kv_heads, f"{prefix}.k_layernorm", inputs.rotary)
    keys = update_cache(graph, shape, inputs.layer, "key", keys)
    values = split_heads(graph, v, kv_heads, head)
    if config.value_norm:
        values = weightless_norm(graph, shape, values, f"{prefix}.v_layernorm.out", head)
    values = update_cache(graph, shape, inputs.layer, "value", values)
    factor = score_scale(config)
    mask = inputs.mask
    if config.attention_sinks:
        mask = with_sinks(graph, shape, mask, prefix)
    if config.attn_logit_softcapping is None:
        context = graph.node("Attention", [queries, keys, values, mask], f"{prefix}.context", scale=factor)
    else:
        context = _capped(graph, shape, (queries, keys, values), mask, factor, prefix)
    gate = linear(graph, shape, x, f"{prefix}.gate", (heads * head, config.hidden_size)) if config.attention_gate else None
    return merged(graph, shape, context, prefix, gate)


def merged(graph: GraphWriter, shape: RankShape, context: str, prefix: str, gate: str | None = None) -> str:
    """Add the output of attention: merge the heads of `context` [batch, heads, tokens, size], project, sum over the ranks.

    `gate` [batch, tokens, heads x size]: its sigmoid multiplies the merged heads.
    """
    config, width = shape.config, shape.num_heads * shape.config.value_size
    tokens = graph.node("Transpose", [context], f"{prefix}.context_t", perm=[0, 2, 1, 3])
    flat = graph.node("Reshape", [tokens, graph.constant(f"shape_merged_{width}", [0, 0, width])], f"{prefix}.merged")
    if gate is not None:
        flat = graph.node("Mul", [flat, graph.node("Sigmoid", [gate], f"{gate}.sigmoid")], f"{prefix}.gated")
    return row_linear(graph, shape, flat, f"{prefix}.dense", (config.hidden_size, width), bias=config.attn_dense_bias)


def scaled_queries(graph: GraphWriter, queries: str, inputs: LayerInputs) -> str:
    """Add the queries times their factor. Returns `queries` without one."""
    if inputs.query_scale is None:
        return queries
    return graph.node("Mul", [queries, inputs.query_scale], f"{queries}.scaled")


def split_heads(graph: GraphWriter, x: str, num_heads: int, head_size: int) -> str:
    """Reshape [batch, tokens, heads x size] to [batch, heads, tokens, size]."""
    shape = graph.constant(f"shape_{num_heads}_heads_{head_size}", [0, 0, num_heads, head_size])
    return graph.node("Transpose", [graph.node("Reshape", [x, shape], f"{x}.split")], f"{x}.heads", perm=[0, 2, 1, 3])


def _normed_and_rotated(graph: GraphWriter, shape: RankShape, x: str, num_heads: int, norm: str, rotary: tuple[str, ...]) -> str:
    """Split queries or keys into heads, normed over all heads before the split or per head after it, and rotated."""
    config = shape.config
    if config.qk_layernorm == "full":
        x = split_rms_norm(graph, shape, x, f"{norm}.weight", f"{norm}.out", num_heads * config.head_size)
    heads = split_heads(graph, x, num_heads, config.head_size)
    if config.qk_norm_after_rotary:
        return _normed_heads(graph, shape, rotate(graph, shape, heads, rotary), norm, is_rotated=bool(rotary))
    return rotate(graph, shape, _normed_heads(graph, shape, heads, norm, is_rotated=bool(rotary)), rotary)


def _normed_heads(graph: GraphWriter, shape: RankShape, heads: str, norm: str, *, is_rotated: bool) -> str:
    """Add the norm of each head [batch, heads, tokens, size], where the layer has one."""
    config = shape.config
    if config.qk_layernorm == "head":
        return rms_norm(graph, shape, heads, f"{norm}.weight", f"{norm}.out", config.head_size)
    if config.qk_layernorm == "rotated" and is_rotated:
        return weightless_norm(graph, shape, heads, f"{norm}.out", config.head_size)
    return heads


def rotate(graph: GraphWriter, shape: RankShape, x: str, rotary: tuple[str, ...]) -> str:
    """Add the rotary embedding of queries or keys [batch, heads, tokens, size], of which a leading part is rotated, or all.

    Returns `x` in a layer without rotary embedding, for which `rotary` is empty.
    """
    if not rotary:
        return x
    config = shape.config
    attributes = {"interleaved": 1} if config.rotary_interleaved else {}
    if config.rotary_embedding_dim and not config.is_latent:
        attributes["rotary_embedding_dim"] = config.rotary_embedding_dim
    return graph.node("RotaryEmbedding", [x, *rotary], f"{x}.rotary", **attributes)


def _capped(graph: GraphWriter, shape: RankShape, qkv: tuple[str, str, str], mask: str, factor: float, prefix: str) -> str:
    """Add attention with soft-capped scores, in primitive operators: TensorRT's parser refuses the fused operator with a cap.

    Query heads are grouped by key/value head, [B, kv heads, group, tokens, size], so that keys and values are not repeated.
    """
    queries, keys, values = qkv
    group = shape.num_heads // shape.num_kv_heads
    grouped = graph.constant("shape_grouped", [0, shape.num_kv_heads, group, -1, shape.config.head_size])
    axis = graph.constant("axis_2", [2])
    q = graph.node("Reshape", [queries, grouped], f"{prefix}.grouped")
    k = graph.node("Unsqueeze", [graph.node("Transpose", [keys], f"{prefix}.keys_t", perm=[0, 1, 3, 2]), axis], f"{prefix}.keys")
    scores = scale(graph, graph.node("MatMul", [q, k], f"{prefix}.products"), factor, f"{prefix}.scaled", shape.dtype)
    scores = soft_cap(graph, scores, shape.config.attn_logit_softcapping, f"{prefix}.scores", shape.dtype)
    wide = graph.node("Cast", [scores], f"{prefix}.scores_wide", to=graph.onnx_dtype("float32"))
    visible = graph.node("Unsqueeze", [mask, axis], f"{prefix}.visible")
    hidden = graph.scalar("masked", _MASKED, "float32")
    masked = graph.node("Where", [visible, wide, hidden], f"{prefix}.masked")
    chances = graph.node("Softmax", [masked], f"{prefix}.chances", axis=-1)
    narrow = graph.node("Cast", [chances], f"{prefix}.chances_cast", to=graph.onnx_dtype(shape.dtype))
    mixed = graph.node("MatMul", [narrow, graph.node("Unsqueeze", [values, axis], f"{prefix}.values")], f"{prefix}.mixed")
    flat = graph.constant("shape_heads", [0, shape.num_heads, -1, shape.config.head_size])
    return graph.node("Reshape", [mixed, flat], f"{prefix}.context")
