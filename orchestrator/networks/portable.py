"""The graph of a pipeline stage that ONNX Runtime GenAI runs: the ranks merged, weights mapped from their safetensors files.

Inputs, with B sequences, S tokens each, C cache slots, layer L of the model, tensor-parallel rank r of T:

    input_ids      int64 [B, S]            first stage; hidden_states float32 [B, S, hidden] on the others
    position_ids   int64 [B, S]            position of each token in its sequence, which is its cache slot; 0 for padding
    past_key_values.N.key / .value         [B, kv_heads of a rank, C, head_size], N = L * T + r; with latent attention, whose layer
                                           has one cache tensor, its two halves

Outputs: `hidden_states_out` [B, S, hidden], or `logits` float32 [B, 1, vocabulary] of each sequence's last token on the last stage,
and `present_key_values.N.key / .value`, which may share memory with the inputs. These names and shapes are ONNX Runtime GenAI's
(its src/models/ and genai_config.json). Arithmetic is float32; weights are widened in the graph, from the bytes as stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from orchestrator.base.errors import SourceCorruptError, SourceMissingError
from orchestrator.model.quantization import check_portable
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.networks.decoder import decoder_network
from orchestrator.networks.graph import ONNX_DTYPES, Dim, GraphWriter
from orchestrator.networks.merge import merge_ranks, ranked
from orchestrator.networks.rendering import Rendering

_STORED = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8", "F8_E4M3": "float8",
}  # fmt: skip
"""Dtype of a graph by safetensors dtype."""
_RANKED = re.compile(r"rank(\d+)\.(.*)")
_CACHE = re.compile(r"rank(\d+)\.(past_key_values|present_key_values)\.(\d+)\.(key|value)")
_AGAIN = "Make the checkpoint again with this version's `orchestrator convert`."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Bytes of a tensor in a file beside the graph."""

    file: str
    dtype: str
    """safetensors dtype."""
    offset: int
    num_bytes: int


def portable_stage(
    network: StageNetwork, weights: Sequence[Mapping[str, StoredTensor]], replicated: Collection[str] = ()
) -> onnx.ModelProto:
    """Write the graph of a stage. `weights`: the stored tensors of each tensor-parallel rank, by name.

    `replicated`: names of tensors that are equal on all ranks. The graph reads those of rank 0, and what all ranks would compute
    from them alike is computed once.

    Raises SourceMissingError and SourceCorruptError for weights that do not fit, QuantizationError as `check_portable`.
    """
    stage = network.stage
    check_portable(stage.quantization)
    ranks = [decoder_network(network, tp_rank, Rendering.for_genai()) for tp_rank in range(stage.tp)]
    tables = ranks[0].tables  # all ranks turn by the same angles
    merged = merge_ranks([rank.model for rank in ranks], [*tables, *replicated]).graph
    graph = GraphWriter(merged.name)
    graph.take(inputs=(value for value in merged.input if value.name not in ("write_indices", "logit_indices")))
    _derive_inputs(graph, stage)
    caches = [value for value in merged.output if _CACHE.fullmatch(value.name)]
    ending, result = _ending(graph, network)
    results = [result, *(value.name for value in caches)]
    nodes = _needed(_distinct([*merged.node, *ending], results), results)
    initializers = {tensor.name: tensor for tensor in merged.initializer}
    looked_up = _looked_up(nodes)
    for node in nodes:
        for name in node.input:
            tensor = initializers.pop(name, None)
            if tensor is None:
                continue
            if name in tables:
                graph.floats(name, tables[name])
            elif tensor.data_location == TensorProto.EXTERNAL:
                _map(graph, tensor, weights, whole=name not in looked_up)
            else:
                graph.take(initializers=[tensor])
        graph.take(nodes=_widening(graph, node))
    size: list[Dim] = ["batch", 1, stage.config.vocab_size] if stage.is_last else ["batch", "tokens", stage.config.hidden_size]
    graph.output(result, "float32", size)
    graph.take(outputs=caches)
    model = graph.model()
    if len({node.name for node in model.graph.node}) < len(model.graph.node):
        raise ValueError("two nodes of the portable graph have one name, which ONNX Runtime refuses")
    _number_caches(model.graph, stage)
    return model


def _derive_inputs(graph: GraphWriter, stage: StageOptions) -> None:
    """Add what GenAI does not feed: the first slot to write, and the index of each sequence's last token."""
    graph.node("Gather", ["position_ids", graph.constant("portable.zero", 0)], "write_indices", axis=1)
    if stage.is_last:
        graph.node("ArgMax", ["position_ids"], "logit_indices", axis=1, keepdims=1)


def _ending(graph: GraphWriter, network: StageNetwork) -> tuple[list[onnx.NodeProto], str]:
    """Return the nodes that make the stage's result from those of its ranks, and the result's name."""
    stage = network.stage
    result = "logits" if stage.is_last else "hidden_states_out"
    if not stage.is_last or network.gather_logits:
        return [helper.make_node("Identity", [ranked(result, 0)], [result], name=result)], result
    parts = [ranked(result, tp_rank) for tp_rank in range(stage.tp)]
    joined = helper.make_node("Concat", parts, ["logits.padded"], name="logits.padded", axis=2)
    bounds = {"first": [0], "vocabulary": [stage.config.vocab_size], "axis_2": [2]}
    inputs = ["logits.padded", *(graph.constant(f"portable.{name}", value) for name, value in bounds.items())]
    return [joined, helper.make_node("Slice", inputs, [result], name=result)], result


def _distinct(nodes: Iterable[onnx.NodeProto], results: Collection[str]) -> list[onnx.NodeProto]:
    """Return the nodes without those that repeat an earlier one, whose outputs are read in their place."""
    same: dict[str, str] = {}
    first: dict[bytes, onnx.NodeProto] = {}
    kept = []
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        key = onnx.NodeProto()
        key.CopyFrom(node)
        key.ClearField("name")
        key.ClearField("output")
        earlier = first.setdefault(key.SerializeToString(deterministic=True), node)
        if earlier is node or not set(results).isdisjoint(node.output):
            kept.append(node)
        else:
            same |= dict(zip(node.output, earlier.output, strict=True))
    return kept


def _needed(nodes: Sequence[onnx.NodeProto], results: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the results depend on: ranks above 0 need not compute the stage's result again."""
    wanted, kept = set(results), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _looked_up(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the values of which only single rows are read: an embedding is not widened as a whole."""
    rows = {node.input[0] for node in nodes if node.op_type == "Gather"}
    return rows - {name for node in nodes for name in node.input[(node.op_type == "Gather") :]}


def _widening(graph: GraphWriter, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the node; rows that it looks up in 16 bits are widened."""
    stored = f"{node.input[0]}.stored" if node.input else ""
    if node.op_type != "Gather" or not graph.is_initializer(stored):
        return [node]
    rows, wide = f"{node.output[0]}.stored", node.output[0]
    node.input[0], node.output[0], node.name = stored, rows, rows
    return [node, helper.make_node("Cast", [rows], [wide], name=wide, to=TensorProto.FLOAT)]


def _map(graph: GraphWriter, tensor: onnx.TensorProto, weights: Sequence[Mapping[str, StoredTensor]], *, whole: bool) -> None:
    """Add an initializer of the merged graph, made from the bytes of the rank that it belongs to.

    `whole`: widen it here; else `_widening` widens the rows that are read.
    """
    owner = _RANKED.fullmatch(tensor.name)
    tp_rank, name = (int(owner[1]), owner[2]) if owner else (0, tensor.name)
    stored = weights[tp_rank].get(name)
    if stored is None:
        raise SourceMissingError(f"the checkpoint of tensor-parallel rank {tp_rank} lacks {name}", _AGAIN)
    dims, kind = list(tensor.dims), tensor.data_type
    if kind == TensorProto.INT4 and stored.dtype == "I8":
        _unpack(graph, tensor.name, dims, stored)
    elif kind == TensorProto.FLOAT and stored.dtype in ("F16", "BF16"):
        source = _external(graph, f"{tensor.name}.stored", _STORED[stored.dtype], dims, stored)
        if whole:
            graph.node("Cast", [source], tensor.name, to=TensorProto.FLOAT)
    elif ONNX_DTYPES.get(_STORED.get(stored.dtype, "")) == kind:
        _external(graph, tensor.name, _STORED[stored.dtype], dims, stored)
    else:
        raise SourceCorruptError(f"{name} is {stored.dtype} in the rank's checkpoint, which its graph does not take", _AGAIN)


def _external(graph: GraphWriter, name: str, dtype: str, dims: list[int], stored: StoredTensor) -> str:
    """Add an initializer whose bytes are a range of a file beside the graph. Raises SourceCorruptError for another size."""
    expected = math.prod(dims) * helper.tensor_dtype_to_np_dtype(ONNX_DTYPES[dtype]).itemsize
    if expected != stored.num_bytes:
        raise SourceCorruptError(f"{name} has {stored.num_bytes} bytes in the rank's checkpoint, not {expected}", _AGAIN)
    location = {"location": stored.file, "offset": str(stored.offset), "length": str(stored.num_bytes)}
    return graph.external(name, dtype, dims, location)


def _unpack(graph: GraphWriter, name: str, dims: list[int], stored: StoredTensor) -> None:
    """Add an int8 weight [rows, columns] made from nibbles, two rows per byte, the first in the low half.

    A nibble v is the number (v xor 8) - 8. ONNX's own INT4 packs two columns per byte, so the bytes cannot be mapped as such.
    """
    rows, columns = dims
    packed = _external(graph, f"{name}.stored", "uint8", [rows // 2, columns], stored)
    nibbles = [
        graph.node("BitwiseAnd", [packed, graph.scalar("portable.low", 0x0F, "uint8")], f"{name}.even"),
        graph.node("BitShift", [packed, graph.scalar("portable.half", 4, "uint8")], f"{name}.odd", direction="RIGHT"),
    ]
    axis = graph.constant("portable.axis", [1])
    columns_first = [graph.node("Unsqueeze", [nibble, axis], f"{nibble}.row") for nibble in nibbles]
    pairs = graph.node("Concat", columns_first, f"{name}.pairs", axis=1)
    flat = graph.node("Reshape", [pairs, graph.constant(f"portable.shape_{rows}_{columns}", dims)], f"{name}.nibbles")
    flipped = graph.node("BitwiseXor", [flat, graph.scalar("portable.sign", 8, "uint8")], f"{name}.flipped")
    signed = graph.node("Cast", [flipped], f"{name}.biased", to=TensorProto.INT8)
    graph.node("Sub", [signed, graph.scalar("portable.bias", 8, "int8")], name)


def _number_caches(graph: onnx.GraphProto, stage: StageOptions) -> None:
    """Give the caches of all ranks the numbers of layers, which GenAI counts through the whole model: layer * tp + tp_rank."""

    def number(name: str) -> str:
        found = _CACHE.fullmatch(name)
        if found is None:
            return name
        tp_rank, kind, layer, what = found.groups()
        return f"{kind}.{(stage.first_layer + int(layer)) * stage.tp + int(tp_rank)}.{what}"

    for value in (*graph.input, *graph.output):
        value.name = number(value.name)
    for node in graph.node:
        node.input[:] = map(number, node.input)
        node.output[:] = map(number, node.output)
