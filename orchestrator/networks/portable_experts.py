"""ONNX Runtime's own layer of experts, com.microsoft.MoE of its contrib_ops/cpu/moe: the portable graph has it for chosen experts.

It reads each chosen expert where its weights lie, and computes it for the tokens that chose it. Gather, with which the compiled
graph lists chosen experts, copies them first, and ONNX Runtime widens 16 bits on one core.

The layer takes the router's logits: their softmax decides, and the `k` largest shares, scaled to sum to one, weigh the outputs.
So it is given the logarithms of the weights, and its output is multiplied by their sum. An expert of weight zero is not computed.
"""

from __future__ import annotations

import numpy as np

from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.layers import scale
from orchestrator.networks.router import Routing
from orchestrator.networks.shape import RankShape

_NEVER = -1.0e4
"""Logarithm that stands for that of zero: its share is zero beside that of any float32."""


def has_portable_layer(shape: RankShape, prefix: str) -> bool:
    """Whether a rank's experts are computed by this layer: the portable graph's, unquantized SwiGLU, with weights from zero up."""
    moe = shape.config.moe
    assert moe is not None
    is_swiglu = moe.gated and shape.config.hidden_act in ("silu", "swish", "swiglu")
    is_plain = not moe.weighs_input and not moe.own_norms
    is_quantized = any(shape.format_of(f"{prefix}.{linear}") for linear in ("fc", "proj"))
    return shape.runtime_layers and shape.experts != "dense" and is_swiglu and is_plain and not is_quantized


def portable_layer(graph: GraphWriter, shape: RankShape, routing: Routing, x: str, prefix: str) -> str:
    """Add the weighted sum of the rank's experts, as x [batch, tokens, hidden]."""
    moe, experts, hidden = shape.config.moe, shape.num_experts, shape.config.hidden_size
    assert moe is not None
    moe_tp = shape.tp // shape.moe_ep
    width = shape.config.expert_size // moe_tp
    tokens = graph.node("Reshape", [x, graph.constant(f"rows_of_{hidden}", [-1, hidden])], f"{prefix}.layer.tokens")
    logits, total = _logits(graph, shape, routing, f"{prefix}.layer")
    both = _by_turns(graph, graph.external(f"{prefix}.fc.weight", shape.dtype, (experts, 2 * width, hidden)), width)
    down = graph.external(f"{prefix}.proj.weight", shape.dtype, (experts, hidden, width))
    both_bias = down_bias = ""
    if moe.expert_bias:  # each of the ranks that share an expert adds its part of the last
        both_bias = _by_turns(graph, graph.external(f"{prefix}.fc.bias", shape.dtype, (experts, 2 * width)), width)
        stored = graph.external(f"{prefix}.proj.bias", shape.dtype, (experts, hidden))
        down_bias = scale(graph, stored, 1.0 / moe_tp, f"{prefix}.proj.bias_part", shape.dtype)
    bound = {} if moe.swiglu_limit is None else {"swiglu_limit": moe.swiglu_limit}
    out = graph.node(
        "MoE", [tokens, logits, both, both_bias, down, down_bias], f"{prefix}.layer.out", domain="com.microsoft",
        k=min(moe.top_k, experts), normalize_routing_weights=1, activation_type="swiglu", swiglu_fusion=1,
        activation_alpha=moe.swiglu_alpha, activation_beta=moe.swiglu_beta, **bound,
    )  # fmt: skip
    weighted = graph.node("Mul", [out, total], f"{prefix}.layer.weighted")
    return graph.node("Reshape", [weighted, graph.node("Shape", [x], f"{prefix}.layer.size")], f"{prefix}.experts")


def _by_turns(graph: GraphWriter, weight: str, width: int) -> str:
    """Add the rows of the gate and of the up by turns, of [experts, up and gate, ...]. A Gather, so that few bits are moved."""
    up = np.arange(width)
    rows = graph.constant(f"by_turns_{width}", np.stack([up + width, up], axis=1).reshape(-1))
    return graph.node("Gather", [weight, rows], f"{weight}.by_turns", axis=1)


def _logits(graph: GraphWriter, shape: RankShape, routing: Routing, prefix: str) -> tuple[str, str]:
    """Add the layer's logits, [batch x tokens, experts of the rank], and the sum of a token's weights, [batch x tokens, 1]."""
    flat = graph.node("Squeeze", [routing.weights, graph.constant("axis_2", [2])], f"{prefix}.flat")
    weights = graph.node("Transpose", [flat], f"{prefix}.weights", perm=[1, 0])
    total = graph.node("ReduceSum", [weights, graph.constant("axis_1", [1])], f"{prefix}.total", keepdims=1)
    nothing, shares = graph.scalar("weightless", 0.0, "float32"), weights
    if shape.moe_ep > 1:  # a token that chose none of the rank's experts has one of them computed, the first, for nothing
        first = graph.floats(f"first_of_{shape.num_experts}", np.eye(1, shape.num_experts))
        has_none = graph.node("Equal", [total, nothing], f"{prefix}.has_none")
        shares = graph.node("Where", [has_none, first, weights], f"{prefix}.shares")
    is_chosen = graph.node("Greater", [shares, nothing], f"{prefix}.is_chosen")
    logarithm = graph.node("Log", [shares], f"{prefix}.logarithm")
    logits = [is_chosen, logarithm, graph.scalar("never", _NEVER, "float32")]
    return graph.node("Where", logits, f"{prefix}.logits"), total
