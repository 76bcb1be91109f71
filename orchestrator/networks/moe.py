"""Mixture of experts: the router in float32, the rank's experts, and the shared expert.

Every local expert computes every token. The sum is weighted by the router, with zero for experts that were not chosen. The result
is exact, but takes more arithmetic than a kernel that gathers tokens.
"""

from __future__ import annotations

import onnx

from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.layers import all_reduce, gated_halves, linear
from orchestrator.networks.quantized import quantized_input, quantized_weight
from orchestrator.networks.shape import RankShape


def moe_mlp(graph: GraphWriter, shape: RankShape, x: str, prefix: str) -> str:
    """Add the experts and the shared expert, if any, with one all-reduce for both."""
    total = _experts(graph, shape, x, prefix)
    assert shape.config.moe is not None
    if shape.config.moe.shared_expert_intermediate_size:
        total = graph.node("Add", [total, _shared_expert(graph, shape, x, prefix)], f"{prefix}.with_shared")
    return all_reduce(graph, shape, total)


def _experts(graph: GraphWriter, shape: RankShape, x: str, prefix: str) -> str:
    config, moe = shape.config, shape.config.moe
    assert moe is not None
    local = moe.num_experts // shape.moe_ep
    width = config.expert_size * shape.moe_ep // shape.tp
    weights = _routing(graph, shape, x, prefix, local)
    # [batch, 1, tokens, hidden] @ [experts, hidden, 2 x width]
    both = _batched(graph, shape, x, f"{prefix}.fc", (local, 2 * width, config.hidden_size), shared=True)
    product = gated_halves(graph, shape, both, f"{prefix}.expert", width)
    out = _batched(graph, shape, product, f"{prefix}.proj", (local, config.hidden_size, width), shared=False)
    weighted = graph.node("Mul", [out, weights], f"{prefix}.weighted")
    return graph.node("ReduceSum", [weighted, graph.constant("axis_1", [1])], f"{prefix}.sum", keepdims=0)


def _batched(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: tuple[int, int, int], *, shared: bool) -> str:
    """Add x @ weight^T for all experts, [batch, experts, tokens, out]. `size`: (experts, out, in).

    x is [batch, tokens, in], the same for all experts (`shared`), or [batch, experts, tokens, in].
    """
    experts, out, inner = size
    fmt, factor = shape.format_of(prefix), None
    if fmt is None:
        weight = graph.external(f"{prefix}.weight", shape.dtype, size)
    else:
        weight = quantized_weight(graph, shape, prefix, (out, inner), fmt, experts)
        if not shared:  # quantized_input takes [batch, tokens, in] only
            x = graph.node("Reshape", [x, graph.constant(f"flat_{inner}_experts", [0, -1, inner])], f"{prefix}.input_flat")
        x, factor = quantized_input(graph, shape, x, prefix, inner, fmt)
        if not shared:
            x = _per_expert(graph, x, experts, inner)
    wide = graph.node("Unsqueeze", [x, graph.constant("axis_1", [1])], f"{prefix}.tokens") if shared else x
    product = graph.node(
        "MatMul", [wide, graph.node("Transpose", [weight], f"{prefix}.weight_t", perm=[0, 2, 1])], f"{prefix}.matmul"
    )
    if factor is None:
        return product
    factor = (
        graph.node("Unsqueeze", [factor, graph.constant("axis_1", [1])], f"{prefix}.factor")
        if shared
        else _per_expert(graph, factor, experts, 1)
    )
    return graph.node("Mul", [product, factor], f"{prefix}.rescaled")


def _per_expert(graph: GraphWriter, x: str, experts: int, size: int) -> str:
    """Reshape [batch, experts x tokens, size] to [batch, experts, tokens, size]."""
    return graph.node("Reshape", [x, graph.constant(f"experts_{experts}_{size}", [0, experts, -1, size])], f"{x}.experts")


def _routing(graph: GraphWriter, shape: RankShape, x: str, prefix: str, local: int) -> str:
    """Add the routing weights, [batch, local experts, tokens, 1], with zero for experts that were not chosen."""
    config, moe = shape.config, shape.config.moe
    assert moe is not None
    wide = graph.node("Cast", [x], f"{prefix}.router_in", to=onnx.TensorProto.FLOAT)
    logits = linear(graph, shape, wide, f"{prefix}.router", (moe.num_experts, config.hidden_size), dtype="float32")
    chances = graph.node("Softmax", [logits], f"{prefix}.chances", axis=-1)
    values, indices = f"{prefix}.top_values", f"{prefix}.top_indices"
    graph.nodes("TopK", [chances, graph.constant("top_k", [moe.top_k])], [values, indices], axis=-1)
    if moe.normalization_mode == 1:
        total = graph.node("ReduceSum", [values, graph.constant("axis_last", [-1])], f"{prefix}.top_sum", keepdims=1)
        values = graph.node("Div", [values, total], f"{prefix}.top_normed")
    nothing = graph.node("Sub", [chances, chances], f"{prefix}.zeros")
    spread = graph.node("ScatterElements", [nothing, indices, values], f"{prefix}.spread", axis=-1)
    begin = shape.moe_ep_rank * local
    bounds = [graph.constant(f"expert_{begin}", [begin]), graph.constant(f"expert_{begin + local}", [begin + local])]
    mine = graph.node("Slice", [spread, *bounds, graph.constant("axis_last", [-1])], f"{prefix}.mine")
    turned = graph.node("Transpose", [mine], f"{prefix}.mine_t", perm=[0, 2, 1])
    narrow = graph.node("Cast", [turned], f"{prefix}.mine_cast", to=graph.onnx_dtype(shape.dtype))
    return graph.node("Unsqueeze", [narrow, graph.constant("axis_3", [3])], f"{prefix}.routing")


def _shared_expert(graph: GraphWriter, shape: RankShape, x: str, prefix: str) -> str:
    """Add the shared expert: split like a dense MLP, weighted by its gate. The caller sums over the ranks."""
    config, moe = shape.config, shape.config.moe
    assert moe is not None
    width = moe.shared_expert_intermediate_size // shape.tp
    both = linear(graph, shape, x, f"{prefix}.shared_expert.fc", (2 * width, config.hidden_size))
    product = gated_halves(graph, shape, both, f"{prefix}.shared_expert", width)
    out = linear(graph, shape, product, f"{prefix}.shared_expert.proj", (config.hidden_size, width))
    gate = linear(graph, shape, x, f"{prefix}.shared_expert_gate", (1, config.hidden_size))
    weight = graph.node("Sigmoid", [gate], f"{prefix}.shared_expert_gate.sigmoid")
    return graph.node("Mul", [out, weight], f"{prefix}.shared_expert.weighted")
