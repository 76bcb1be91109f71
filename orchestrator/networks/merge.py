"""Merging of the rank graphs of a stage into one ONNX graph, which any executor runs in one process without a communicator.

Names get the rank's prefix, except inputs and initializers that all ranks share. The `DistCollective` nodes of all ranks become
one operator: `Sum` for an all-reduce, `Concat` along axis 0 for an all-gather. Its output is shared, so it has no prefix. Each
rank keeps its weights: none are merged or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx
from onnx import helper

from orchestrator.networks.kv_cache import PAST

_COLLECTIVE = "DistCollective"
Rename = Callable[[str], str]


def ranked(name: str, rank: int) -> str:
    """Return the name in the merged graph of `name` in the graph of a rank."""
    return f"rank{rank}.{name}"


def merge_ranks(models: Sequence[onnx.ModelProto], shared_initializers: Iterable[str] = ()) -> onnx.ModelProto:
    """Merge the graphs of a stage's ranks, in rank order.

    Inputs keep their names, except the KV caches, `rank{r}.past_key_values...`. Outputs of every rank are kept with its prefix, so
    that the caller can check that the ranks agree. `shared_initializers`: names of initializers that are equal on all ranks, kept
    once. Raises ValueError for graphs that are not of one stage.
    """
    _check(models)
    shared = {value.name for value in models[0].graph.input if not value.name.startswith(PAST)} | set(shared_initializers)
    parts = [_parts(model.graph.node) for model in models]
    meeting = {node.output[0] for _, node in parts[0] if node is not None}
    renames = [_rename(rank, shared | meeting) for rank in range(len(models))]
    nodes: list[onnx.NodeProto] = []
    for lockstep in zip(*parts, strict=True):
        for (before, _), rename in zip(lockstep, renames, strict=True):
            nodes += [_renamed_node(node, rename) for node in before]
        collectives = [node for _, node in lockstep if node is not None]
        if collectives:
            nodes.append(_meet(collectives, renames))
    graph = helper.make_graph(
        nodes,
        models[0].graph.name,
        [value for rank, model in enumerate(models) for value in _values(model.graph.input, renames[rank], rank, shared)],
        [value for rank, model in enumerate(models) for value in _values(model.graph.output, renames[rank], rank, set())],
        initializer=[
            _renamed_initializer(item, renames[rank])
            for rank, model in enumerate(models)
            for item in model.graph.initializer
            if rank == 0 or item.name not in shared
        ],
    )
    return helper.make_model(
        graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version, producer_name=models[0].producer_name
    )


def _check(models: Sequence[onnx.ModelProto]) -> None:
    if not models:
        raise ValueError("no rank to merge")
    meetings = [
        [(node.output[0], _attribute(node, "collective_operation")) for _, node in _parts(model.graph.node) if node]
        for model in models
    ]
    for rank, found in enumerate(meetings):
        if found != meetings[0]:
            raise ValueError(f"rank {rank} has other collectives than rank 0: they are not ranks of one stage")
    for model in models:
        for node in model.graph.node:
            if node.op_type == _COLLECTIVE and _attribute(node, "nb_rank") != len(models):
                raise ValueError(f"{node.name} is among {_attribute(node, 'nb_rank')} ranks, {len(models)} are merged")
            if any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute):
                raise ValueError(f"{node.name} holds a graph, whose names would need prefixes too")


def _parts(nodes: Iterable[onnx.NodeProto]) -> list[tuple[list[onnx.NodeProto], onnx.NodeProto | None]]:
    """Split the nodes at each collective. Returns (nodes, collective) pairs; None: no collective follows."""
    found: list[tuple[list[onnx.NodeProto], onnx.NodeProto | None]] = []
    before: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == _COLLECTIVE:
            found.append((before, node))
            before = []
        else:
            before.append(node)
    return [*found, (before, None)]


def _attribute(node: onnx.NodeProto, name: str) -> int | str:
    value = next(helper.get_attribute_value(item) for item in node.attribute if item.name == name)
    return value.decode() if isinstance(value, bytes) else int(value)


def _rename(rank: int, kept: set[str]) -> Rename:
    return lambda name: name if not name or name in kept else ranked(name, rank)


def _meet(collectives: Sequence[onnx.NodeProto], renames: Sequence[Rename]) -> onnx.NodeProto:
    """Return the operator that replaces the collectives of all ranks, in rank order."""
    first = collectives[0]
    inputs = [rename(node.input[0]) for node, rename in zip(collectives, renames, strict=True)]
    match _attribute(first, "collective_operation"):
        case "all_reduce" if _attribute(first, "reduce_op") == "sum":
            return helper.make_node("Sum", inputs, [first.output[0]], name=first.name)
        case "all_gather":
            return helper.make_node("Concat", inputs, [first.output[0]], name=first.name, axis=0)
        case operation:
            raise ValueError(f"{first.name}: no operator replaces the collective {operation}")


def _renamed_node(node: onnx.NodeProto, rename: Rename) -> onnx.NodeProto:
    renamed = onnx.NodeProto()
    renamed.CopyFrom(node)
    renamed.name = rename(node.name)
    renamed.input[:] = [rename(name) for name in node.input]
    renamed.output[:] = [rename(name) for name in node.output]
    return renamed


def _values(values: Iterable[onnx.ValueInfoProto], rename: Rename, rank: int, shared: set[str]) -> Iterable[onnx.ValueInfoProto]:
    """Yield the renamed inputs or outputs of a rank. Shared values come with rank 0 only."""
    for value in values:
        if value.name not in shared or rank == 0:
            renamed = onnx.ValueInfoProto()
            renamed.CopyFrom(value)
            renamed.name = rename(value.name)
            yield renamed


def _renamed_initializer(tensor: onnx.TensorProto, rename: Rename) -> onnx.TensorProto:
    renamed = onnx.TensorProto()
    renamed.CopyFrom(tensor)
    renamed.name = rename(tensor.name)
    return renamed
