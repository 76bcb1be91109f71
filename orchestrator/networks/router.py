"""Router of a mixture of experts, in float32: scores, the choice, and the weights of the chosen experts.

transformers computes the same in float32. Its softmax routers multiply in the model's dtype first; here that too is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from orchestrator.model.config import MoeConfig
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.layers import linear, scale
from orchestrator.networks.shape import RankShape

_NEVER = -3.0e38
"""Score of an expert that cannot be chosen."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Choice of experts for the tokens, and their weights."""

    weights: str
    """Weights of the rank's experts in the graph's dtype, [local experts, batch x tokens, 1]; zero: not chosen."""
    chosen: str
    """Numbers of the chosen experts among those of all ranks, int64 [batch, tokens, top_k]."""
    chosen_weights: str
    """Their weights, float32 [batch, tokens, top_k]."""


def routing(graph: GraphWriter, shape: RankShape, moe: MoeConfig, x: str, prefix: str) -> Routing:
    """Add the router."""
    scores = _scores(graph, shape, moe, x, prefix)
    values, indices = _chosen(graph, moe, scores, prefix)
    if moe.scoring == "sparse_mixer":
        values = _mixed(graph, moe, scores, values, indices, prefix)
    weights = _weights(graph, moe, values, prefix)
    if moe.own_norms:
        factors = graph.external(f"{prefix}.router.per_expert_scale", "float32", [moe.num_experts])
        factors = graph.node("Gather", [factors, indices], f"{prefix}.top_factors", axis=0)
        weights = graph.node("Mul", [weights, factors], f"{prefix}.top_weights")
    nothing = graph.node("Sub", [scores, scores], f"{prefix}.zeros")
    spread = graph.node("ScatterElements", [nothing, indices, weights], f"{prefix}.spread", axis=-1)
    local, begin = shape.num_experts, shape.first_expert
    bounds = [graph.constant(f"expert_{begin}", [begin]), graph.constant(f"expert_{begin + local}", [begin + local])]
    mine = graph.node("Slice", [spread, *bounds, graph.constant("axis_last", [-1])], f"{prefix}.mine")
    flat = graph.node("Reshape", [mine, graph.constant(f"rows_of_{local}", [-1, local])], f"{prefix}.mine_flat")
    turned = graph.node("Transpose", [flat], f"{prefix}.mine_t", perm=[1, 0])
    narrow = graph.node("Cast", [turned], f"{prefix}.mine_cast", to=graph.onnx_dtype(shape.dtype))
    return Routing(graph.node("Unsqueeze", [narrow, graph.constant("axis_2", [2])], f"{prefix}.routing"), indices, weights)


def _scores(graph: GraphWriter, shape: RankShape, moe: MoeConfig, x: str, prefix: str) -> str:
    """Add the scores of all experts, [batch, tokens, experts]: logits where they become scores after the choice."""
    wide = graph.node("Cast", [x], f"{prefix}.router_in", to=onnx.TensorProto.FLOAT)
    size = (moe.num_experts, shape.config.hidden_size)
    if moe.own_norms:
        factors = graph.external(f"{prefix}.router.scale", "float32", [shape.config.hidden_size])
        attributes = {"axis": -1, "epsilon": shape.config.norm_epsilon, "stash_type": 1}
        wide = graph.node("RMSNormalization", [wide, factors], f"{prefix}.router_normed", **attributes)
        wide = scale(graph, wide, float(shape.config.hidden_size) ** -0.5, f"{prefix}.router_scaled", "float32")
    logits = linear(graph, shape, wide, f"{prefix}.router", size, bias=moe.router_bias, dtype="float32")
    if moe.scoring == "softmax":
        return graph.node("Softmax", [logits], f"{prefix}.chances", axis=-1)
    return graph.node("Sigmoid", [logits], f"{prefix}.chances") if moe.scoring == "sigmoid" else logits


def _chosen(graph: GraphWriter, moe: MoeConfig, scores: str, prefix: str) -> tuple[str, str]:
    """Add the scores and the numbers of the chosen experts, [batch, tokens, top_k]."""
    ranking = scores
    if moe.selection_bias:
        bias = graph.external(f"{prefix}.router.e_score_correction_bias", "float32", [moe.num_experts])
        ranking = graph.node("Add", [scores, bias], f"{prefix}.ranking")
    if moe.kept_groups < moe.num_groups:
        ranking = _of_kept_groups(graph, moe, ranking, prefix)
    values, indices = f"{prefix}.top_values", f"{prefix}.top_indices"
    graph.nodes("TopK", [ranking, graph.constant("top_k", [moe.top_k])], [values, indices], axis=-1)
    if moe.selection_bias:  # the bias decides who is chosen, not how much it counts
        values = graph.node("GatherElements", [scores, indices], f"{prefix}.top_scores", axis=-1)
    return values, indices


def _of_kept_groups(graph: GraphWriter, moe: MoeConfig, ranking: str, prefix: str) -> str:
    """Add the ranking with the lowest score for experts outside of the groups whose two best experts score highest."""
    groups = graph.constant("groups", [0, 0, moe.num_groups, moe.num_experts // moe.num_groups])
    grouped = graph.node("Reshape", [ranking, groups], f"{prefix}.grouped")
    best, best_indices = f"{prefix}.group_best", f"{prefix}.group_best_indices"
    graph.nodes("TopK", [grouped, graph.constant("best_of_group", [2])], [best, best_indices], axis=-1)
    strength = graph.node("ReduceSum", [best, graph.constant("axis_last", [-1])], f"{prefix}.group_strength", keepdims=0)
    kept, kept_indices = f"{prefix}.group_kept", f"{prefix}.group_kept_indices"
    graph.nodes("TopK", [strength, graph.constant("kept_groups", [moe.kept_groups])], [kept, kept_indices], axis=-1)
    one = graph.scalar("group_one", 1.0, "float32")
    ones = graph.node("Add", [graph.node("Sub", [kept, kept], f"{prefix}.group_no"), one], f"{prefix}.group_yes")
    nothing = graph.node("Sub", [strength, strength], f"{prefix}.group_zeros")
    mask = graph.node("ScatterElements", [nothing, kept_indices, ones], f"{prefix}.group_mask", axis=-1)
    visible = graph.node("Greater", [mask, graph.scalar("group_half", 0.5, "float32")], f"{prefix}.group_visible")
    column = graph.node("Unsqueeze", [visible, graph.constant("axis_3", [3])], f"{prefix}.group_column")
    masked = graph.node("Where", [column, grouped, _never(graph)], f"{prefix}.group_ranking")
    return graph.node("Reshape", [masked, graph.constant("ungrouped", [0, 0, moe.num_experts])], f"{prefix}.ungrouped")


def _mixed(graph: GraphWriter, moe: MoeConfig, logits: str, values: str, indices: str, prefix: str) -> str:
    """Add the chances of the chosen experts, [batch, tokens, top_k], from their logits `values` (SparseMixer).

    The experts are chosen one after the other. Each gets its softmax among the experts near it that were not chosen before. As
    transformers computes it in inference; GRIN: GRadient-INformed MoE (Liu et al. 2024).
    """
    remaining, found = logits, []
    for place in range(moe.top_k):
        name = f"{prefix}.mixer{place}"
        bounds = [graph.constant(f"place_{each}", [each]) for each in (place, place + 1)]
        bounds.append(graph.constant("axis_last", [-1]))
        best = graph.node("Slice", [values, *bounds], f"{name}.best")
        number = graph.node("Slice", [indices, *bounds], f"{name}.number")
        near = graph.node("Where", [_far(graph, moe, logits, best, name), _never(graph), remaining], f"{name}.near")
        chances = graph.node("Softmax", [near], f"{name}.chances", axis=-1)
        found.append(graph.node("GatherElements", [chances, number], f"{name}.chance", axis=-1))
        remaining = _without(graph, remaining, best, number, name)
    return graph.node("Concat", found, f"{prefix}.mixed", axis=-1)


def _far(graph: GraphWriter, moe: MoeConfig, logits: str, best: str, prefix: str) -> str:
    """Add whether logits are less than `best` by more than 2 * jitter of their size: of their absolute value, or `best` if larger.

    transformers divides by that size, which may be zero.
    """
    size = graph.node("Max", [graph.node("Abs", [logits], f"{prefix}.absolute"), best], f"{prefix}.size")
    reach = graph.node("Mul", [size, graph.scalar("mixer_share", 2 * moe.jitter, "float32")], f"{prefix}.reach")
    return graph.node("Greater", [graph.node("Sub", [best, logits], f"{prefix}.distance"), reach], f"{prefix}.far")


def _without(graph: GraphWriter, remaining: str, best: str, number: str, prefix: str) -> str:
    """Add the logits without that of a chosen expert."""
    gone = graph.node("Add", [graph.node("Sub", [best, best], f"{prefix}.nothing"), _never(graph)], f"{prefix}.gone")
    return graph.node("ScatterElements", [remaining, number, gone], f"{prefix}.remaining", axis=-1)


def _never(graph: GraphWriter) -> str:
    return graph.scalar("never", _NEVER, "float32")


def _weights(graph: GraphWriter, moe: MoeConfig, values: str, prefix: str) -> str:
    """Add the weights of the chosen experts from their scores."""
    if moe.scoring == "softmax_of_chosen":
        values = graph.node("Softmax", [values], f"{prefix}.top_chances", axis=-1)
    elif moe.scoring == "sigmoid_of_chosen":
        values = graph.node("Sigmoid", [values], f"{prefix}.top_chances")
    if moe.normalization_mode == 1:
        total = graph.node("ReduceSum", [values, graph.constant("axis_last", [-1])], f"{prefix}.top_sum", keepdims=1)
        if moe.sum_epsilon:
            total = graph.node("Add", [total, graph.scalar("sum_epsilon", moe.sum_epsilon, "float32")], f"{prefix}.top_sum_shifted")
        if moe.sum_minimum:
            total = graph.node("Max", [total, graph.scalar("sum_minimum", moe.sum_minimum, "float32")], f"{prefix}.top_sum_bounded")
        values = graph.node("Div", [values, total], f"{prefix}.top_normed")
    return scale(graph, values, moe.routed_scale, f"{prefix}.top_scaled", "float32")
