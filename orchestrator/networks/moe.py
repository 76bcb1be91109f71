"""Mixture of experts: the rank's experts, weighted by the router, and the shared expert.

Every expert that a call computes, computes every token. The sum is weighted by the router, with zero for experts that a token did
not choose; in Llama 4, the experts' inputs are, and an expert makes zeros of zeros. In the dense form these are all experts of
the rank; in the gathered form those that any token chose, and one decode step reads the weights of few. TensorRT takes no
quantized weights in a Gather, so these are dequantized before. TensorRT's own layer stands in place of either where it is asked
for, and ONNX Runtime's in the portable graph, where it has one for the experts.
"""

from __future__ import annotations

from orchestrator.model.config import MoeConfig
from orchestrator.networks.chosen_experts import chosen_experts
from orchestrator.networks.expert_layer import moe_layer
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.layers import activate, all_reduce, gated_halves, linear, norm, scale
from orchestrator.networks.portable_experts import has_portable_layer, portable_layer
from orchestrator.networks.quantized import quantized_input, quantized_weight
from orchestrator.networks.router import routing
from orchestrator.networks.shape import RankShape


def moe_mlp(graph: GraphWriter, shape: RankShape, x: str, prefix: str) -> str:
    """Add the experts and the shared expert, if any, with one all-reduce for both."""
    moe = shape.config.moe
    assert moe is not None
    total = _experts(graph, shape, moe, x, prefix)
    if moe.shared_expert_intermediate_size:
        total = graph.node("Add", [total, _shared_expert(graph, shape, moe, x, prefix)], f"{prefix}.with_shared")
    total = scale(graph, total, moe.output_scale, f"{prefix}.output_scaled", shape.dtype)
    return all_reduce(graph, shape, total)


def experts_beside_mlp(graph: GraphWriter, shape: RankShape, hidden: str, normed: str, layer: str) -> str:
    """Add the dense MLP of `normed` and the experts of `hidden`, each with norms of its own (Gemma 4).

    The dense MLP has the names of a shared expert.
    """
    moe, prefix = shape.config.moe, f"{layer}.mlp"
    assert moe is not None

    def own_norm(x: str, name: str) -> str:
        return norm(graph, shape, x, f"{layer}.{name}", f"{layer}.{name}.out")

    dense = all_reduce(graph, shape, _shared_expert(graph, shape, moe, normed, prefix))
    routed = _experts(graph, shape, moe, own_norm(hidden, "pre_feedforward_layernorm_2"), prefix, hidden)
    routed = own_norm(all_reduce(graph, shape, routed), "post_feedforward_layernorm_2")
    return graph.node("Add", [own_norm(dense, "post_feedforward_layernorm_1"), routed], f"{prefix}.with_dense")


def _experts(graph: GraphWriter, shape: RankShape, moe: MoeConfig, x: str, prefix: str, scored: str = "") -> str:
    """Add the weighted sum of the experts' outputs, as x [batch, tokens, hidden]. `scored`: the router's input, by default x.

    Sequences follow each other as one row of tokens, so that each expert's weights are read once for all. (And ONNX Runtime 1.31
    multiplies [B, 1, S, H] by [E, H, W] wrongly on CUDA where B equals E.)
    """
    routed = routing(graph, shape, moe, scored or x, prefix)
    if shape.experts == "trt_moe" and not shape.portable:
        return moe_layer(graph, shape, routed, x, prefix)
    if has_portable_layer(shape, prefix):
        return portable_layer(graph, shape, routed, x, prefix)
    config, moe_tp = shape.config, shape.tp // shape.moe_ep
    local, hidden = shape.num_experts, config.hidden_size
    width = config.expert_size // moe_tp
    rows = (2 if moe.gated else 1) * width
    numbers, weights = None, routed.weights
    if shape.experts == "gathered":
        chosen = chosen_experts(graph, shape, routed, prefix)
        numbers, weights = chosen.numbers, chosen.weights
    tokens = graph.node("Reshape", [x, graph.constant(f"row_of_{hidden}", [1, -1, hidden])], f"{prefix}.tokens")
    if moe.weighs_input:
        tokens = graph.node("Mul", [tokens, weights], f"{prefix}.tokens_weighted")
    both = _batched(graph, shape, tokens, f"{prefix}.fc", (local, rows, hidden), numbers)
    if moe.expert_bias:
        both = _biased(graph, shape, both, f"{prefix}.fc", (local, rows), numbers)
    product = _activated(graph, shape, moe, both, f"{prefix}.expert", width)
    out = _batched(graph, shape, product, f"{prefix}.proj", (local, hidden, width), numbers)
    if moe.expert_bias:  # each of the ranks that share an expert adds its part, because the sum over the ranks comes last
        out = _biased(graph, shape, out, f"{prefix}.proj", (local, hidden), numbers, 1.0 / moe_tp)
    if not moe.weighs_input:
        out = graph.node("Mul", [out, weights], f"{prefix}.weighted")
    total = graph.node("ReduceSum", [out, graph.constant("axis_0", [0])], f"{prefix}.sum", keepdims=0)
    return graph.node("Reshape", [total, graph.node("Shape", [x], f"{prefix}.size")], f"{prefix}.experts")


def _of_chosen(graph: GraphWriter, x: str, numbers: str | None) -> str:
    """Add the rows of the chosen experts, [M, ...], of [experts, ...]. Returns x where all are computed (None)."""
    return x if numbers is None else graph.node("Gather", [x, numbers], f"{x}.chosen", axis=0)


def _biased(
    graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: tuple[int, int], numbers: str | None, part: float = 1.0
) -> str:
    """Add `part` of the bias of each expert, [experts, out], to [experts, tokens, out]."""
    stored = _of_chosen(graph, graph.external(f"{prefix}.bias", shape.dtype, size), numbers)
    bias = scale(graph, stored, part, f"{prefix}.bias_part", shape.dtype)
    wide = graph.node("Unsqueeze", [bias, graph.constant("axis_1", [1])], f"{prefix}.bias_tokens")
    return graph.node("Add", [x, wide], f"{prefix}.biased")


def _activated(graph: GraphWriter, shape: RankShape, moe: MoeConfig, both: str, prefix: str, width: int) -> str:
    """Add what an expert computes between its linears."""
    if not moe.gated:
        return activate(graph, shape, both, f"{prefix}.activated")
    if moe.swiglu_limit is None and moe.swiglu_alpha == 1.0 and moe.swiglu_beta == 0.0:
        return gated_halves(graph, shape, both, prefix, width)
    return _clamped(graph, shape, moe, both, prefix, width)


def _clamped(graph: GraphWriter, shape: RankShape, moe: MoeConfig, both: str, prefix: str, width: int) -> str:
    """Add gate * sigmoid(alpha * gate) * (up + beta), of a gate bounded from above and an up bounded from both sides."""
    dtype = shape.dtype
    up, gate = f"{prefix}.up", f"{prefix}.gate"
    graph.nodes("Split", [both, graph.constant(f"halves_{width}", [width, width])], [up, gate], axis=-1)
    if moe.swiglu_limit is not None:
        limit = graph.scalar(f"swiglu_limit.{dtype}", moe.swiglu_limit, dtype)
        least = graph.scalar(f"swiglu_least.{dtype}", -moe.swiglu_limit, dtype)
        gate = graph.node("Min", [gate, limit], f"{prefix}.gate_bounded")
        up = graph.node("Max", [graph.node("Min", [up, limit], f"{prefix}.up_below"), least], f"{prefix}.up_bounded")
    steep = scale(graph, gate, moe.swiglu_alpha, f"{prefix}.gate_steep", dtype)
    swish = graph.node("Mul", [gate, graph.node("Sigmoid", [steep], f"{prefix}.gate_sigmoid")], f"{prefix}.activated")
    if moe.swiglu_beta:
        up = graph.node("Add", [up, graph.scalar(f"swiglu_beta.{dtype}", moe.swiglu_beta, dtype)], f"{prefix}.up_shifted")
    return graph.node("Mul", [swish, up], f"{prefix}.product")


def _batched(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: tuple[int, int, int], numbers: str | None) -> str:
    """Add x @ weight^T for the experts, [experts, tokens, out]. `size`: (experts, out, in); `numbers`: as in `_of_chosen`.

    x is [1, tokens, in], the same for all experts, or [experts, tokens, in].
    """
    experts, out, inner = size
    fmt, factor = shape.format_of(prefix), None
    if fmt is None:
        weight = graph.external(f"{prefix}.weight", shape.dtype, size)
    else:
        weight = quantized_weight(graph, shape, prefix, (out, inner), fmt, experts)
        x, factor = quantized_input(graph, shape, x, prefix, inner, fmt)
    transposed = graph.node("Transpose", [_of_chosen(graph, weight, numbers)], f"{prefix}.weight_t", perm=[0, 2, 1])
    product = graph.node("MatMul", [x, transposed], f"{prefix}.matmul")
    return product if factor is None else graph.node("Mul", [product, factor], f"{prefix}.rescaled")


def _shared_expert(graph: GraphWriter, shape: RankShape, moe: MoeConfig, x: str, prefix: str) -> str:
    """Add the shared expert: split like a dense MLP, weighted by its gate, if any. The caller sums over the ranks."""
    config = shape.config
    width = moe.shared_expert_intermediate_size // shape.tp
    rows = (2 if moe.gated else 1) * width
    both = linear(graph, shape, x, f"{prefix}.shared_expert.fc", (rows, config.hidden_size))
    product = _activated(graph, shape, moe, both, f"{prefix}.shared_expert", width)
    out = linear(graph, shape, product, f"{prefix}.shared_expert.proj", (config.hidden_size, width))
    if not moe.shared_expert_gate:
        return out
    gate = linear(graph, shape, x, f"{prefix}.shared_expert_gate", (1, config.hidden_size))
    weight = graph.node("Sigmoid", [gate], f"{prefix}.shared_expert_gate.sigmoid")
    return graph.node("Mul", [out, weight], f"{prefix}.shared_expert.weighted")
