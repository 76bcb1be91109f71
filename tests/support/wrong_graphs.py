"""Mistakes in the network of a mixture, planted in place of the right function, to see the miniature catch them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from orchestrator.model.config import MoeConfig
from orchestrator.networks import layers, router
from orchestrator.networks import moe as mixtures
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.shape import RankShape
from tests.support.wrong_rules import hub_config

_CHOSEN, _OF_KEPT_GROUPS, _SHARED_EXPERT, _WEIGHTS, _ADD_BIAS = (
    router._chosen, router._of_kept_groups, mixtures._shared_expert, router._weights, layers._add_bias
)  # fmt: skip


def _bias_after_the_choice(graph: GraphWriter, moe: MoeConfig, scores: str, prefix: str) -> tuple[str, str]:
    """Choose by the scores alone, and add the bias to the weights of the chosen."""
    bias = graph.external(f"{prefix}.router.e_score_correction_bias", "float32", [moe.num_experts])
    indices = f"{prefix}.top_indices"
    graph.nodes("TopK", [scores, graph.constant("top_k", [moe.top_k])], [f"{prefix}.top_values", indices], axis=-1)
    biased = graph.node("Add", [scores, bias], f"{prefix}.ranking")
    return graph.node("GatherElements", [biased, indices], f"{prefix}.top_scores", axis=-1), indices


def _bias_in_the_weights(graph: GraphWriter, moe: MoeConfig, scores: str, prefix: str) -> tuple[str, str]:
    """Choose rightly, and weigh by score + bias."""
    _, indices = _CHOSEN(graph, moe, scores, prefix)
    return f"{prefix}.top_values", indices


def _groups_shifted(graph: GraphWriter, moe: MoeConfig, ranking: str, prefix: str) -> str:
    """Take the groups from the second expert on."""
    zero, one = graph.constant("shift_0", [0]), graph.constant("shift_1", [1])
    end, axis = graph.constant("shift_end", [moe.num_experts]), graph.constant("axis_last", [-1])
    rest = graph.node("Slice", [ranking, one, end, axis], f"{prefix}.shift_rest")
    first = graph.node("Slice", [ranking, zero, one, axis], f"{prefix}.shift_first")
    masked = _OF_KEPT_GROUPS(graph, moe, graph.node("Concat", [rest, first], f"{prefix}.shifted", axis=-1), prefix)
    last = graph.constant("shift_last", [moe.num_experts - 1])
    back = graph.node("Slice", [masked, last, end, axis], f"{prefix}.shift_back")
    others = graph.node("Slice", [masked, zero, last, axis], f"{prefix}.shift_others")
    return graph.node("Concat", [back, others], f"{prefix}.shifted_back", axis=-1)


def _no_shared_expert(graph: GraphWriter, shape: RankShape, moe: MoeConfig, x: str, prefix: str) -> str:
    found = _SHARED_EXPERT(graph, shape, moe, x, prefix)
    return graph.node("Sub", [found, found], f"{prefix}.shared_expert.left_out")


def _scaled_before_the_norm(graph: GraphWriter, moe: MoeConfig, values: str, prefix: str) -> str:
    return _WEIGHTS(graph, moe.model_copy(update={"routed_scale": 1.0}), values, prefix)


def _size_of_its_own(graph: GraphWriter, moe: MoeConfig, logits: str, best: str, prefix: str) -> str:
    """Measure the distance by the size of each logit alone."""
    size = graph.node("Abs", [logits], f"{prefix}.size")
    reach = graph.node("Mul", [size, graph.scalar("mixer_share", 2 * moe.jitter, "float32")], f"{prefix}.reach")
    return graph.node("Greater", [graph.node("Sub", [best, logits], f"{prefix}.distance"), reach], f"{prefix}.far")


def _size_of_the_best(graph: GraphWriter, moe: MoeConfig, logits: str, best: str, prefix: str) -> str:
    """Measure the distance by the size of the chosen expert's logit."""
    share = graph.scalar("mixer_share", 2 * moe.jitter, "float32")
    reach = graph.node("Mul", [graph.node("Abs", [best], f"{prefix}.size"), share], f"{prefix}.reach")
    return graph.node("Greater", [graph.node("Sub", [best, logits], f"{prefix}.distance"), reach], f"{prefix}.far")


def _with_the_chosen(_graph: GraphWriter, remaining: str, _best: str, _number: str, _prefix: str) -> str:
    """Leave the first expert in the softmax of the second."""
    return remaining


def _no_bias_of_head(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: int, dtype: str | None = None) -> str:
    return x if prefix == "lm_head" else _ADD_BIAS(graph, shape, x, prefix, size, dtype)


@dataclass(frozen=True)
class WrongGraph:
    """A function of a module, what stands in its place, and a config whose miniature shows the difference."""

    name: str
    config: dict[str, Any]
    module: ModuleType
    function: str
    wrong: Callable[..., Any]

    def __str__(self) -> str:
        return self.name


WRONG_GRAPHS = [
    WrongGraph("bias added after the top-k", hub_config("glm-4.6"), router, "_chosen", _bias_after_the_choice),
    WrongGraph("minimax_m2 bias added after the top-k", hub_config("minimax-m2"), router, "_chosen", _bias_after_the_choice),
    WrongGraph("bias counted in the weights", hub_config("glm-4.6"), router, "_chosen", _bias_in_the_weights),
    WrongGraph("ernie bias counted in the weights", hub_config("ernie-4.5-21b-a3b"), router, "_chosen", _bias_in_the_weights),
    WrongGraph("groups off by one", hub_config("deepseek-v3-bf16"), router, "_of_kept_groups", _groups_shifted),
    WrongGraph("shared expert left out", hub_config("glm-4.5-air"), mixtures, "_shared_expert", _no_shared_expert),
    WrongGraph("ernie shared expert left out", hub_config("ernie-4.5-21b-a3b"), mixtures, "_shared_expert", _no_shared_expert),
    WrongGraph("scaled before the norm", hub_config("glm-4.6"), router, "_weights", _scaled_before_the_norm),
    WrongGraph("distance by each logit's own size", hub_config("phi-3.5-moe"), router, "_far", _size_of_its_own),
    WrongGraph("distance by the best logit's size", hub_config("phi-3.5-moe"), router, "_far", _size_of_the_best),
    WrongGraph("first expert left among the second's", hub_config("phi-3.5-moe"), router, "_without", _with_the_chosen),
    WrongGraph("bias of the head left out", hub_config("phi-3.5-moe"), layers, "_add_bias", _no_bias_of_head),
]
