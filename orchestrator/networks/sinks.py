"""Attention sinks (gpt-oss): a learned score per head that takes part in the softmax and has no value.

Keys and values of one cache slot are zero: the slot after the last one that the call writes, which the next call overwrites. Its
product with any query is zero, so the mask, which is added to the scores, gives it the head's sink as its score:

    sum_i exp(s_i) v_i / (sum_i exp(s_i) + exp(sink))

So attention stays one operator. The mask has a row per head, as large as the scores of the call.
"""

from __future__ import annotations

from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.kv_cache import call_length
from orchestrator.networks.shape import RankShape

_HIDDEN = {"float16": -65504.0}
"""Score of a slot that a token does not attend to; by dtype."""
_HIDDEN_WIDE = -3.0e38


def additive(graph: GraphWriter, mask: str, dtype: str) -> str:
    """Add a mask that is added to the scores, [batch, 1, tokens, slots], from one that is true where a token attends to a slot."""
    seen = graph.scalar(f"seen.{dtype}", 0.0, dtype)
    hidden = graph.scalar(f"hidden.{dtype}", _HIDDEN.get(dtype, _HIDDEN_WIDE), dtype)
    return graph.node("Where", [mask, seen, hidden], f"{mask}.additive")


def with_sinks(graph: GraphWriter, shape: RankShape, mask: str, prefix: str) -> str:
    """Add the mask of a layer, [batch, heads, tokens, slots], with the heads' sinks. `mask`: result of `additive`."""
    axes = graph.constant("axes_0_2_3", [0, 2, 3])
    sinks = graph.node("Unsqueeze", [graph.external(f"{prefix}.sinks", shape.dtype, [shape.num_heads]), axes], f"{prefix}.sinks_4d")
    return graph.node("Where", [_sink_slot(graph), sinks, mask], f"{prefix}.mask")


def _sink_slot(graph: GraphWriter) -> str:
    """Add the mask that is true in each sequence's slot of zeros, [batch, 1, 1, slots]."""
    if graph.has("slots.sink"):
        return "slots.sink"
    slot = graph.node("Add", ["write_indices", call_length(graph)], "sink.slot")
    column = graph.node("Unsqueeze", [slot, graph.constant("axes_1_2_3", [1, 2, 3])], "sink.slot_4d")
    return graph.node("Equal", ["slots", column], "slots.sink")
