"""Experts that a call computes: those that its tokens chose.

The list of a call has min(tokens x top_k, local experts) entries, a size that follows from the call's shape alone. So one graph,
and one engine, reads few experts' weights when it decodes, and each expert once in a prefill. `If` on the number of tokens would
spare a prefill the copy of what it gathers, but around a whole mixture it crashes the builder of TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.router import Routing
from orchestrator.networks.shape import RankShape


@dataclass(frozen=True, slots=True)
class ChosenExperts:
    """Entries of the list, M in number."""

    numbers: str
    """Numbers among the rank's experts, int64 [M]. Several entries may name one expert."""
    weights: str
    """Weight of each token for each entry, [M, batch x tokens, 1]; zero for an entry that names an expert again."""


def chosen_experts(graph: GraphWriter, shape: RankShape, routing: Routing, prefix: str) -> ChosenExperts:
    """Add the list of the experts that the tokens chose, or of all experts of the rank, whichever is shorter.

    A choice of another rank's expert becomes the rank's first expert, which costs time only: weights come from the routing.
    """
    prefix = f"{prefix}.chosen"
    local, every = shape.num_experts, graph.constant(f"experts_{shape.num_experts}", np.arange(shape.num_experts))
    number = graph.constant(f"number_{local}", [local])
    nothing = graph.constant("zero_1d", [0])
    choices = graph.node("Reshape", [routing.chosen, graph.constant("flat", [-1])], f"{prefix}.flat")
    if shape.moe_ep > 1:
        choices, _ = mine(graph, shape, choices, prefix)
    count = graph.node("Shape", [choices], f"{prefix}.count")
    size = graph.node("Min", [count, number], f"{prefix}.size")
    start = _start(graph, count, number, prefix)
    both = graph.node("Concat", [choices, every], f"{prefix}.both", axis=0)
    numbers = graph.node("Slice", [both, start, graph.node("Add", [start, size], f"{prefix}.end")], f"{prefix}.numbers")
    weights = graph.node("Gather", [routing.weights, numbers], f"{prefix}.routing", axis=0)
    places = graph.node("Slice", [every, nothing, size], f"{prefix}.places")
    first = _first(graph, numbers, places, prefix)
    factor = graph.node("Cast", [first], f"{prefix}.first_cast", to=graph.onnx_dtype(shape.dtype))
    wide = graph.node("Unsqueeze", [factor, graph.constant("axes_12", [1, 2])], f"{prefix}.first_wide")
    return ChosenExperts(numbers, graph.node("Mul", [weights, wide], f"{prefix}.weights"))


def _start(graph: GraphWriter, count: str, number: str, prefix: str) -> str:
    """Add where the list begins among the choices followed by all experts: with the former if they are fewer."""
    is_few = graph.node("Less", [count, number], f"{prefix}.is_few")
    return graph.node("Where", [is_few, graph.constant("zero_1d", [0]), count], f"{prefix}.start")


def mine(graph: GraphWriter, shape: RankShape, choices: str, prefix: str) -> tuple[str, str]:
    """Add the numbers of the choices among the rank's experts, zero for experts of other ranks, and whether they are the rank's."""
    first = graph.constant(f"expert_{shape.first_expert}", [shape.first_expert])
    nothing = graph.constant("zero_1d", [0])
    shifted = graph.node("Sub", [choices, first], f"{prefix}.shifted")
    above = graph.node("GreaterOrEqual", [shifted, nothing], f"{prefix}.above")
    below = graph.node("Less", [shifted, graph.constant(f"number_{shape.num_experts}", [shape.num_experts])], f"{prefix}.below")
    is_mine = graph.node("And", [above, below], f"{prefix}.is_mine")
    return graph.node("Where", [is_mine, shifted, nothing], f"{prefix}.mine"), is_mine


def _first(graph: GraphWriter, numbers: str, places: str, prefix: str) -> str:
    """Add float32 [M]: 1 for the first entry of an expert, 0 for others. `places`: 0 .. M-1."""

    def pairs(x: str, operation: str) -> str:
        row = graph.node("Unsqueeze", [x, graph.constant("axis_0", [0])], f"{x}.row")
        column = graph.node("Unsqueeze", [x, graph.constant("axis_1", [1])], f"{x}.column")
        return graph.node(operation, [row, column], f"{x}.{operation.lower()}")

    repeated = graph.node("And", [pairs(numbers, "Equal"), pairs(places, "Less")], f"{prefix}.repeated")
    counted = graph.node("Cast", [repeated], f"{prefix}.repeated_cast", to=graph.onnx_dtype("float32"))
    again = graph.node("ReduceMax", [counted, graph.constant("axis_1", [1])], f"{prefix}.again", keepdims=0)
    return graph.node("Sub", [graph.scalar("whole", 1.0, "float32"), again], f"{prefix}.first")
