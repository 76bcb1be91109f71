"""What decoders are made of: norm, linear, attention through the KV cache, gated MLP, collectives."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.model_config import ModelConfig
from orchestrator.networks.graph import GraphWriter


@dataclass(frozen=True, slots=True)
class RankShape:
    """The sizes of one tensor-parallel rank."""

    config: ModelConfig
    tp: int
    dtype: str
    """That the graph computes in; weights are bound in it."""

    @property
    def num_heads(self) -> int:
        return self.config.num_attention_heads // self.tp

    @property
    def num_kv_heads(self) -> int:
        return self.config.kv_heads_per_rank(self.tp)

    @property
    def intermediate_size(self) -> int:
        return self.config.intermediate_size // self.tp


def rms_norm(graph: GraphWriter, shape: RankShape, x: str, weight: str, output: str) -> str:
    """Root-mean-square norm over the last axis, accumulated in float32."""
    scale = graph.external(weight, shape.dtype, [shape.config.hidden_size])
    return graph.node("RMSNormalization", [x, scale], output, axis=-1, epsilon=shape.config.norm_epsilon, stash_type=1)


def linear(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: tuple[int, int], *, bias: bool = False) -> str:
    """x @ weight^T (+ bias); `size` is (out, in), the layout of the checkpoint."""
    weight = graph.external(f"{prefix}.weight", shape.dtype, size)
    transposed = graph.node("Transpose", [weight], f"{prefix}.weight_t", perm=[1, 0])
    product = graph.node("MatMul", [x, transposed], f"{prefix}.matmul")
    return _add_bias(graph, shape, product, prefix, size[0]) if bias else product


def row_linear(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: tuple[int, int], *, bias: bool = False) -> str:
    """A linear whose input features are split: partial products are summed over the ranks, the bias is added once after."""
    product = all_reduce(graph, shape, linear(graph, shape, x, prefix, size))
    return _add_bias(graph, shape, product, prefix, size[0]) if bias else product


def _add_bias(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: int) -> str:
    return graph.node("Add", [x, graph.external(f"{prefix}.bias", shape.dtype, [size])], f"{prefix}.biased")


def all_reduce(graph: GraphWriter, shape: RankShape, x: str) -> str:
    """Sum over the tensor-parallel ranks."""
    if shape.tp == 1:
        return x
    return graph.node(
        "DistCollective", [x], f"{x}.all_reduce",
        collective_operation="all_reduce", reduce_op="sum", root=-1, nb_rank=shape.tp, group_size=0,
    )  # fmt: skip


def all_gather(graph: GraphWriter, shape: RankShape, x: str) -> str:
    """Concatenate over the tensor-parallel ranks, along axis 0."""
    if shape.tp == 1:
        return x
    return graph.node(
        "DistCollective", [x], f"{x}.all_gather",
        collective_operation="all_gather", reduce_op="none", root=-1, nb_rank=shape.tp, group_size=0,
    )  # fmt: skip


def causal_mask(graph: GraphWriter, shape: RankShape, position_ids: str, cache: str) -> str:
    """Boolean [batch, 1, tokens, slots]: a token at position p sees cache slots 0..p, or the last `sliding_window` of them.

    Slot and position are the same number, so right padding needs no mask of its own: what a padded token wrote lies
    behind every real token until a real one overwrites it.
    """
    length = graph.node("Shape", [cache], "num_slots", start=2, end=3)
    scalar = graph.node("Squeeze", [length, graph.constant("axis_0", [0])], "num_slots.scalar")
    slots = graph.node("Range", [graph.constant("zero", 0), scalar, graph.constant("one", 1)], "slots")
    positions = graph.node("Unsqueeze", [position_ids, graph.constant("axes_1_3", [1, 3])], "positions")
    mask = graph.node("LessOrEqual", [slots, positions], "mask.causal")
    if shape.config.sliding_window is not None:
        window = graph.constant("sliding_window", shape.config.sliding_window)
        oldest = graph.node("Sub", [positions, window], "mask.oldest")
        mask = graph.node("And", [mask, graph.node("Greater", [slots, oldest], "mask.window")], "mask.sliding")
    return mask


def attention(graph: GraphWriter, shape: RankShape, x: str, layer: int, mask: str) -> str:
    """Grouped-query attention of local layer `layer`, its keys and values scattered into the cache first."""
    config, prefix = shape.config, f"transformer.layers.{layer}.attention"
    head, heads, kv_heads = config.head_size, shape.num_heads, shape.num_kv_heads
    widths = [heads * head, kv_heads * head, kv_heads * head]
    qkv = linear(graph, shape, x, f"{prefix}.qkv", (sum(widths), config.hidden_size), bias=config.attn_bias)
    parts = [f"{prefix}.{name}" for name in "qkv"]
    graph.nodes("Split", [qkv, graph.constant("qkv_widths", widths)], parts, axis=-1)
    q = _rotate(graph, _heads(graph, parts[0], heads, head))
    k = _rotate(graph, _heads(graph, parts[1], kv_heads, head))
    v = _heads(graph, parts[2], kv_heads, head)
    keys, values = _scatter(graph, layer, "key", k), _scatter(graph, layer, "value", v)
    context = graph.node("Attention", [q, keys, values, mask], f"{prefix}.context", scale=float(head) ** -0.5)
    merged = graph.node("Transpose", [context], f"{prefix}.context_t", perm=[0, 2, 1, 3])
    flat = graph.node("Reshape", [merged, graph.constant("shape_merged", [0, 0, heads * head])], f"{prefix}.merged")
    return row_linear(graph, shape, flat, f"{prefix}.dense", (config.hidden_size, heads * head), bias=config.attn_bias)


def _heads(graph: GraphWriter, x: str, num_heads: int, head_size: int) -> str:
    """[batch, tokens, heads x size] to [batch, heads, tokens, size]."""
    shape = graph.constant(f"shape_{num_heads}_heads", [0, 0, num_heads, head_size])
    return graph.node("Transpose", [graph.node("Reshape", [x, shape], f"{x}.split")], f"{x}.heads", perm=[0, 2, 1, 3])


def _rotate(graph: GraphWriter, x: str) -> str:
    return graph.node("RotaryEmbedding", [x, "rotary_cos", "rotary_sin", "position_ids"], f"{x}.rotary")


def _scatter(graph: GraphWriter, layer: int, what: str, update: str) -> str:
    """Write the new keys or values at each sequence's write index; the whole cache is an output."""
    return graph.node(
        "TensorScatter", [past_name(layer, what), update, "write_indices"], present_name(layer, what),
        axis=-2, mode="linear",
    )  # fmt: skip


def past_name(layer: int, what: str) -> str:
    """Graph input: keys or values (`what`) of a local layer before the call."""
    return f"past_key_values.{layer}.{what}"


def present_name(layer: int, what: str) -> str:
    """Graph output: the same after the call."""
    return f"present_key_values.{layer}.{what}"


def gated_mlp(graph: GraphWriter, shape: RankShape, x: str, layer: int) -> str:
    """proj(silu(fc(x)) * gate(x)); fc is Hugging Face's gate_proj, gate its up_proj."""
    config, prefix = shape.config, f"transformer.layers.{layer}.mlp"
    size = (shape.intermediate_size, config.hidden_size)
    fc = linear(graph, shape, x, f"{prefix}.fc", size, bias=config.mlp_bias)
    gate = linear(graph, shape, x, f"{prefix}.gate", size, bias=config.mlp_bias)
    activated = graph.node("Mul", [fc, graph.node("Sigmoid", [fc], f"{prefix}.sigmoid")], f"{prefix}.activated")
    product = graph.node("Mul", [activated, gate], f"{prefix}.product")
    return row_linear(graph, shape, product, f"{prefix}.proj", (config.hidden_size, shape.intermediate_size), bias=config.mlp_bias)
