"""The KV cache: names of its inputs and outputs, and its update by a call.

A cache in the model's dtype is updated in place (TensorScatter). TensorRT refuses that operator for INT8 and FP8, so a quantized
cache is read, merged with the new tokens slot by slot, and written as a whole. Then input and output do not share memory. So is a
cache for a server that cannot bind both to one address.
"""

from __future__ import annotations

import onnx

from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.shape import RankShape

PAST = "past_key_values."
"""Prefix of the names of the KV cache's inputs."""
PRESENT = "present_key_values."
"""Prefix of the names of the KV cache's outputs."""


def past_name(layer: int, what: str) -> str:
    """Return the name of the graph input with the keys or values (`what`) of a local layer before the call."""
    return f"{PAST}{layer}.{what}"


def present_name(layer: int, what: str) -> str:
    """Return the name of the graph output with the keys or values (`what`) of a local layer after the call."""
    return f"{PRESENT}{layer}.{what}"


def present_of(past: str) -> str:
    """Return the output with the cache after the call, by the name of its input, with or without a rank's prefix."""
    return past.replace("past_", "present_", 1)


def update_cache(graph: GraphWriter, shape: RankShape, layer: int, what: str, update: str) -> str:
    """Add all keys or values after the call, [B, heads, slots, size] in the graph's dtype. `update`: [B, heads, tokens, size]."""
    if shape.config.attention_sinks:
        update = graph.node("Pad", [update, graph.constant("pads_sink_slot", [0, 0, 0, 0, 0, 0, 1, 0])], f"{update}.with_sink_slot")
    if shape.kv_cache is None and shape.in_place:
        return graph.node(
            "TensorScatter", [past_name(layer, what), update, "write_indices"], present_name(layer, what),
            axis=-2, mode="linear",
        )  # fmt: skip
    prefix = f"transformer.layers.{layer}.attention.{what[0]}_cache"
    if shape.kv_cache is None:
        return _merged(graph, shape, prefix, past_name(layer, what), update, present_name(layer, what))
    scale = graph.external(f"{prefix}_scaling_factor", "float32", [])
    dtype = graph.onnx_dtype(shape.dtype)
    past = graph.node("DequantizeLinear", [past_name(layer, what), scale], f"{prefix}.past", output_dtype=dtype)
    merged = _merged(graph, shape, prefix, past, update, f"{prefix}.merged")
    to = onnx.TensorProto.INT8 if shape.kv_cache == "INT8" else onnx.TensorProto.FLOAT8E4M3FN
    present = graph.node("QuantizeLinear", [merged, scale], present_name(layer, what), output_dtype=to)
    return graph.node("DequantizeLinear", [present, scale], f"{prefix}.present", output_dtype=dtype)


def update_latents(graph: GraphWriter, shape: RankShape, layer: int, update: str) -> str:
    """Add the one cache tensor of a layer with latent attention after the call, from halves where the executor has those."""
    if not shape.halved:
        return update_cache(graph, shape, layer, "key", update)
    halves = [f"{update}.{what}" for what in shape.caches]
    widths = graph.constant("latent_halves", [shape.cache_head_size] * len(halves))
    graph.nodes("Split", [update, widths], halves, axis=-1)
    cached = [update_cache(graph, shape, layer, what, half) for what, half in zip(shape.caches, halves, strict=True)]
    return graph.node("Concat", cached, f"{update}.cached", axis=-1)


def _merged(graph: GraphWriter, shape: RankShape, prefix: str, past: str, update: str, output: str) -> str:
    """Add `output`: the cache `past` with the new tokens in their slots."""
    tokens_first = graph.node("Transpose", [update], f"{prefix}.tokens_first", perm=[0, 2, 1, 3])
    placed = graph.node("GatherND", [tokens_first, _token_of_slot(graph, shape)], f"{prefix}.placed", batch_dims=1)
    new = graph.node("Transpose", [placed], f"{prefix}.new", perm=[0, 2, 1, 3])
    return graph.node("Where", ["slots.written", new, past], output)


def call_length(graph: GraphWriter) -> str:
    """Add the number of tokens of each sequence in this call, padding included, [1]."""
    return "num_tokens" if graph.has("num_tokens") else graph.node("Shape", ["position_ids"], "num_tokens", start=1, end=2)


def _token_of_slot(graph: GraphWriter, shape: RankShape) -> str:
    """Add the token of this call for each slot, [B, slots, 1], and the mask of written slots, `slots.written` [B, 1, slots, 1]."""
    if graph.has("slots.token"):
        return "slots.token"
    first = graph.node("Unsqueeze", ["write_indices", graph.constant("axis_1", [1])], "slots.first")
    token = graph.node("Sub", ["slots", first], "slots.offset")
    num_tokens = call_length(graph)
    if shape.config.attention_sinks:
        num_tokens = graph.node("Add", [num_tokens, graph.constant("one", 1)], "num_written")
    started = graph.node("GreaterOrEqual", [token, graph.constant("zero", 0)], "slots.started")
    ended = graph.node("Less", [token, num_tokens], "slots.not_ended")
    written = graph.node("And", [started, ended], "slots.in_call")
    graph.node("Unsqueeze", [written, graph.constant("axes_1_3", [1, 3])], "slots.written")
    nowhere = graph.node("Where", [written, token, graph.constant("zero", 0)], "slots.token_index")
    return graph.node("Unsqueeze", [nowhere, graph.constant("axis_2", [2])], "slots.token")
