"""TensorRT's own layer of experts (IMoELayer), by the custom operator TRT_MoE of its ONNX parser.

Inputs, as NvInfer.h of TensorRT 11.1 orders them: hidden states [B, S, H], numbers of the chosen experts int32 [B, S, K], their
weights [B, S, K], then the gate, the up and the down weights, [E, H, I], [E, H, I], [E, I, H]. activation_type 1 is SiLU.
"""

from __future__ import annotations

from orchestrator.networks.chosen_experts import mine
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.router import Routing
from orchestrator.networks.shape import RankShape

_SILU = 1


def moe_layer(graph: GraphWriter, shape: RankShape, routing: Routing, x: str, prefix: str) -> str:
    """Add the rank's experts as one layer, [batch, tokens, hidden]. Choices of other ranks' experts weigh zero."""
    experts, hidden = shape.num_experts, shape.config.hidden_size
    width = shape.config.expert_size // (shape.tp // shape.moe_ep)
    numbers, weights = routing.chosen, routing.chosen_weights
    if shape.moe_ep > 1:
        numbers, is_mine = mine(graph, shape, numbers, f"{prefix}.layer")
        weights = graph.node("Where", [is_mine, weights, graph.scalar("weightless", 0.0, "float32")], f"{prefix}.layer.weights")
    narrow = graph.node("Cast", [numbers], f"{prefix}.layer.numbers", to=graph.onnx_dtype("int32"))
    scores = graph.node("Cast", [weights], f"{prefix}.layer.scores", to=graph.onnx_dtype(shape.dtype))
    both = graph.external(f"{prefix}.fc.weight", shape.dtype, (experts, 2 * width, hidden))
    up, gate = f"{prefix}.layer.up", f"{prefix}.layer.gate"
    graph.nodes("Split", [both, graph.constant(f"halves_{width}", [width, width])], [up, gate], axis=1)
    down = graph.external(f"{prefix}.proj.weight", shape.dtype, (experts, hidden, width))
    operands = [graph.node("Transpose", [weight], f"{weight}.layer_t", perm=[0, 2, 1]) for weight in (gate, up, down)]
    return graph.node("TRT_MoE", [x, narrow, scores, *operands], f"{prefix}.layer", domain="trt", activation_type=_SILU)
