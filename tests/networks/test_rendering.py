"""The compiled and the executed graph of a rank are one network: they differ in what `Rendering` lists and in nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import transformers

from orchestrator.families import family_for
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.quantization import ModelQuantization
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks import Rendering, decoder_network
from orchestrator.networks import decoder as decoder_module
from orchestrator.quantizers import QUANTIZERS
from orchestrator.quantizers.resolve import model_quantization
from orchestrator.spec.build import QuantizationSpec
from tests.support.families import BASE, TINY

TOPOLOGIES = (Topology(1, 1), Topology(2, 2))
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 16,
}  # fmt: skip
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
QUANTIZED_LINEAR = re.compile(r"^(node )?transformer\.layers\.\d+\.(attention\.(qkv|dense)|mlp\.(fc|gate|proj))\.")
"""The inside of a linear: test_quantized_networks.py holds each format against Model Optimizer in both renderings."""
OWN_OPERATORS = {"MXFP8", "NVFP4", "W4A16_NVFP4"}
"""Formats that have no standard operators: the linear is written with TensorRT's own, or executed on dequantized weights."""


def config_of(family: str, **changes: Any) -> ModelConfig:
    tiny = TINY[family]
    plain = {"architectures": [tiny.model], **BASE, **tiny.fields, **changes}
    complete = getattr(transformers, tiny.config)(**plain).to_dict()
    return from_hugging_face(complete, tiny.model, "bfloat16", family_for(tiny.model).config)


def networks(config: ModelConfig, topology: Topology, quantization: ModelQuantization | None = None) -> list[StageNetwork]:
    stages = [StageOptions.of(config, topology, pp_rank, quantization) for pp_rank in range(topology.pp)]
    return [StageNetwork(stage=stage, max_seq_len=64) for stage in stages]


def described(model: onnx.ModelProto) -> dict[str, Any]:
    """A graph as plain data by name, without what a rendering may choose: the dtype of floats and the number of cache slots."""

    def attribute(value: Any) -> Any:
        found = onnx.helper.get_attribute_value(value)
        return "float" if value.name in ("to", "output_dtype") and found in FLOATS else found

    def shape(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
        tensor = value.type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        if value.name.startswith(("past_", "present_")):
            dims[2] = "slots"
        return ("float" if tensor.elem_type in FLOATS else tensor.elem_type, *dims)

    def constant(tensor: onnx.TensorProto) -> tuple[Any, ...]:
        kind = "float" if tensor.data_type in FLOATS else tensor.data_type
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return kind, tuple(tensor.dims), "bound"
        values = onnx.numpy_helper.to_array(tensor).astype(np.float64 if kind == "float" else np.int64)
        # bfloat16 keeps 8 bits of a factor.
        return kind, tuple(tensor.dims), tuple(f"{value:.1e}" for value in values.reshape(-1))

    graph = model.graph
    found: dict[str, Any] = {f"in {value.name}": shape(value) for value in graph.input}
    found |= {f"out {value.name}": shape(value) for value in graph.output}
    found |= {re.sub(r"\.(bfloat16|float32)$", "", tensor.name): constant(tensor) for tensor in graph.initializer}
    for number, node in enumerate(graph.node):
        inputs = [re.sub(r"\.(bfloat16|float32)$", "", name) for name in node.input]
        attributes = {value.name: attribute(value) for value in node.attribute}
        found[f"node {node.name}"] = (node.op_type, node.domain, inputs, list(node.output), attributes)
        found[f"place {number}"] = node.name
    return found


def differences(network: StageNetwork, other: StageNetwork | None = None) -> list[str]:
    """Names of what differs between the compiled graph and the executed one (of `other`, where it is given)."""
    compiled = decoder_network(network, 1 % network.stage.tp, Rendering.compiled(network))
    executed = decoder_network(other or network, 1 % network.stage.tp, Rendering.executed())
    one, two = described(compiled.model), described(executed.model)
    for name in compiled.tables.keys() | executed.tables.keys():
        one[f"table {name}"], two[f"table {name}"] = (
            tables[name].tobytes() if name in tables else None for tables in (compiled.tables, executed.tables)
        )
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("family", TINY)
def test_renderings_of_a_family_differ_in_dtype_and_slots_only(family: str, topology: Topology) -> None:
    for network in networks(config_of(family), topology):
        assert differences(network) == []


@pytest.mark.parametrize("scaling", [LONGROPE, {"rope_type": "dynamic", "factor": 2.0}], ids=["longrope", "dynamic"])
def test_renderings_of_a_rotary_that_depends_on_length_differ_in_dtype_only(scaling: dict[str, Any]) -> None:
    for network in networks(config_of("llama").model_copy(update={"rotary_scaling": scaling}), Topology(1, 1)):
        assert differences(network) == []


@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_renderings_of_a_quantized_network_differ_in_tensorrts_own_operators_only(algorithm: str) -> None:
    resolved = model_quantization(QuantizationSpec(algorithm=algorithm), num_layers=3)
    config = config_of("llama", hidden_size=128, intermediate_size=128, head_dim=32)
    for network in networks(config, Topology(1, 1), resolved):
        found = [name for name in differences(network) if not name.startswith("place ")]
        nodes = [name for name in found if name.startswith(("node ", "in ", "out ", "transformer."))]
        assert bool(nodes) == (algorithm in OWN_OPERATORS)
        assert [name for name in nodes if not QUANTIZED_LINEAR.match(name)] == []


def test_tables_for_a_shorter_text_are_not_those_of_the_engine() -> None:
    """The mistake that was published: tables of the verification's length beside tables of the engine's."""
    config = config_of("llama").model_copy(update={"rotary_scaling": LONGROPE})
    (network,) = networks(config, Topology(1, 1))
    found = differences(network, network.model_copy(update={"max_seq_len": 16}))
    assert "table rotary_cos" in found
    assert "node rotary_rows" in found
    assert network.digest(0) != network.model_copy(update={"max_seq_len": 16}).digest(0)


def test_a_window_in_one_rendering_only_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    (network,) = networks(config_of("mistral"), Topology(1, 1))
    true_mask = decoder_module.window_mask
    calls: list[int] = []

    def wider_the_second_time(graph: Any, window: int) -> str:
        calls.append(window)
        return true_mask(graph, window + len(calls) - 1)

    monkeypatch.setattr(decoder_module, "window_mask", wider_the_second_time)
    assert differences(network) == ["sliding_window"]


def test_digest_of_a_network_follows_from_all_that_its_graph_does() -> None:
    (network,) = networks(config_of("llama"), Topology(1, 1))
    others: list[Mapping[str, Any]] = [{"max_seq_len": 32}, {"gather_logits": False}]
    digests = {network.digest(0), network.digest(1), *(network.model_copy(update=dict(change)).digest(0) for change in others)}
    assert len(digests) == 4
