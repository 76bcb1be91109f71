"""Cutting of a rank's graph at collectives, layer ends and amid experts, so that it runs with one slice's weights in memory.

A slice is a run of nodes between two cuts. All ranks of a stage have the same cuts: each slice runs on one rank after the other,
and collectives are computed between slices. Weights are inputs of a slice, and values are numbered instead of named, so equal
layers give the same model, which is compiled once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from orchestrator.networks.decoder import Network
from orchestrator.networks.graph import IR_VERSION
from orchestrator.networks.kv_cache import present_of

_LAYER_END = re.compile(r"(?:rank0\.)?transformer\.layers\.(\d+)\.mlp_residual")
_AMID_EXPERTS = re.compile(r"(?:rank\d+\.)?transformer\.layers\.\d+\.mlp\.expert\.product")
"""Input of the second linear of all experts: each of the two is by far the largest weight of a mixture."""
_RANK = re.compile(r"rank(\d+)\.")


@dataclass(frozen=True, slots=True)
class Collective:
    """An exchange between the ranks of a stage (TensorRT's DistCollective)."""

    operation: str
    """all_reduce (a sum) or all_gather (concatenation along axis 0)."""
    source: str
    """Value that every rank sends."""
    result: str
    """Value that every rank receives."""


_Run = tuple[list[onnx.NodeProto], Collective | None, int | None]
"""Nodes, the collective that follows, and the layer that ends with them."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Nodes that a rank executes alone, and the collective that follows."""

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    """Inputs of the graph and outputs of earlier slices that the slice reads."""
    weights: tuple[str, ...]
    """Initializers that are bound by name."""
    constants: tuple[onnx.TensorProto, ...]
    outputs: tuple[str, ...]
    """Values that later slices or the caller read."""
    collective: Collective | None
    """Collective after the nodes; None: there is none."""
    layer: int | None
    """Number (within the stage) of the layer that ends with the slice; None: no layer ends here."""


@dataclass(frozen=True, slots=True)
class Sliced:
    """A whole graph in slices."""

    slices: tuple[Slice, ...]
    last_use: dict[str, int]
    """Value -> number of the last slice that reads it, itself or in its collective."""

    def is_read_after(self, name: str, number: int) -> bool:
        """Whether a later slice, or the collective of slice `number`, reads the value `name` of that slice."""
        collective = self.slices[number].collective
        return self.last_use.get(name, -1) > number or (collective is not None and collective.source == name)


def cut(network: Network) -> Sliced:
    """Cut a graph after every collective and layer, and between the two linears of all experts.

    Every node except the collectives is in exactly one slice.

    Raises ValueError for a graph whose KV cache is read in one slice and written in another.
    """
    return _cut(network.model.graph, list(_runs(network.model.graph.node)))


def cut_portable(graph: onnx.GraphProto) -> Sliced:
    """Cut a portable graph, whose collectives are operators, where the rank changes, and as `cut`. Raises as `cut`."""
    return _cut(graph, list(_portable_runs(graph.node)))


def _cut(graph: onnx.GraphProto, runs: Sequence[_Run]) -> Sliced:
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL}
    external = {tensor.name for tensor in graph.initializer} - constants.keys()
    last_use: dict[str, int] = {}
    for number, (nodes, collective, _) in enumerate(runs):
        read = {name for node in nodes for name in node.input} | ({collective.source} if collective else set())
        last_use |= {name: number for name in read if name not in constants and name not in external}
    wanted = {value.name for value in graph.output}
    slices = []
    for number, (nodes, collective, layer) in enumerate(runs):
        made = [name for node in nodes for name in node.output]
        read_here = list(dict.fromkeys(name for node in nodes for name in node.input if name))
        mine = set(made)
        later = {name for name in made if last_use.get(name, -1) > number or (collective and name == collective.source)}
        slices.append(
            Slice(
                nodes=tuple(nodes),
                inputs=tuple(name for name in read_here if name not in mine | constants.keys() | external),
                weights=tuple(name for name in read_here if name in external),
                constants=tuple(constants[name] for name in read_here if name in constants),
                outputs=tuple(name for name in made if name in later or name in wanted),
                collective=collective,
                layer=layer,
            )
        )
    _check_caches(slices)
    return Sliced(tuple(slices), last_use)


def _check_caches(slices: Sequence[Slice]) -> None:
    """Check that each KV cache is read in the slice that writes it. Raises ValueError otherwise.

    All calls run through one slice before the next, so another slice would read the cache of another call. Its shape may be read
    anywhere.
    """
    for part in slices:
        for node in part.nodes:
            for name in node.input:
                written = present_of(name) in part.outputs
                if name.startswith("past_") and node.op_type != "Shape" and not written:
                    raise ValueError(f"{node.name} reads {name}, which another slice writes")


def _portable_runs(nodes: Sequence[onnx.NodeProto]) -> Iterator[_Run]:
    run: list[onnx.NodeProto] = []
    rank = None
    for node in nodes:
        owner = _RANK.match(node.name)
        if owner and rank not in (None, owner[1]):
            yield run, None, None
            run = []
        rank = owner[1] if owner else rank
        run.append(node)
        if ended := _LAYER_END.fullmatch(node.name):
            yield run, None, int(ended[1])
            run, rank = [], None
        elif _AMID_EXPERTS.fullmatch(node.name):
            yield run, None, None
            run = []
    if run:
        yield run, None, None


def _runs(nodes: Sequence[onnx.NodeProto]) -> Iterator[_Run]:
    run: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == "DistCollective":
            operation = next(item.s.decode() for item in node.attribute if item.name == "collective_operation")
            yield run, Collective(operation, node.input[0], node.output[0]), None
            run = []
            continue
        run.append(node)
        if ended := _LAYER_END.fullmatch(node.name):
            yield run, None, int(ended[1])
            run = []
        elif _AMID_EXPERTS.fullmatch(node.name):
            yield run, None, None
            run = []
    if run:
        yield run, None, None


def key_of(part: Slice) -> tuple[object, ...]:
    """Return what `executable` makes of a slice, as a value that equals that of every slice which differs only in names."""
    number = _numbering()
    taken = [number(name) for name in (*part.inputs, *part.weights)]
    constants = [
        (number(item.name), item.data_type, *item.dims, item.raw_data or item.SerializeToString()) for item in part.constants
    ]
    nodes = [
        (
            (node.op_type, node.domain, *(item.SerializeToString() for item in node.attribute)),
            tuple(number(name) for name in node.input),
            tuple(number(name) for name in node.output),
        )
        for node in part.nodes
    ]
    return (*taken, *constants, *nodes, *(number(name) for name in part.outputs))


def _numbering() -> Callable[[str], str]:
    """Return a function that numbers names in order of appearance; a missing input stays without a name."""
    numbers: dict[str, str] = {"": ""}
    return lambda name: numbers.setdefault(name, f"v{len(numbers)}")


def looked_up(part: Slice) -> set[str]:
    """Return the weights of which a slice reads single rows only, so that they need not be widened as a whole."""
    readers: dict[str, set[str]] = {}
    for node in part.nodes:
        for position, name in enumerate(node.input):
            readers.setdefault(name, set()).add(f"{node.op_type}{position}")
    return {name for name in part.weights if readers[name] == {"Gather0"}}


def executable(part: Slice, opsets: Sequence[onnx.OperatorSetIdProto], kinds: Sequence[int]) -> onnx.ModelProto:
    """Return the slice as a model. Its inputs are the slice's inputs, then its weights; `kinds` are their ONNX dtypes.

    Rows that are looked up in a 16-bit weight are widened to float32. Values are numbered in order of appearance, so slices that
    differ only in names give equal models.
    """
    narrow = {
        name
        for name, kind in zip((*part.inputs, *part.weights), kinds, strict=True)
        if kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    }
    number = _numbering()
    taken = [number(name) for name in (*part.inputs, *part.weights)]
    constants = []
    for tensor in part.constants:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = number(tensor.name)
        constants.append(copy)
    nodes = []
    for node in part.nodes:
        inputs = [number(name) for name in node.input]
        plain = onnx.NodeProto(
            op_type=node.op_type, domain=node.domain, input=inputs, output=[number(name) for name in node.output]
        )
        plain.attribute.extend(node.attribute)
        nodes.append(plain)
        if node.op_type == "Gather" and node.input[0] in narrow:
            rows = f"{plain.output[0]}.stored"
            nodes.append(helper.make_node("Cast", [rows], [plain.output[0]], to=onnx.TensorProto.FLOAT))
            plain.output[0] = rows
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(taken, kinds, strict=True)]
    results = [onnx.ValueInfoProto(name=number(name)) for name in part.outputs]
    graph = helper.make_graph(nodes, "slice", values, results, initializer=constants)
    return helper.make_model(graph, opset_imports=list(opsets), ir_version=IR_VERSION, producer_name="trt-orchestrator")
