"""The graph of one quantized linear in ONNX Runtime against float64 arithmetic on the same packed numbers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
from onnx.reference import ReferenceEvaluator

from orchestrator.model.quantization import ActivationFormat, LinearFormat, ModelQuantization, WeightFormat, packed, scale_tensors
from orchestrator.model.stage import StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks import Network
from orchestrator.networks.attention import causal_mask
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.kv_cache import update_cache
from orchestrator.networks.quantized import quantized_input, quantized_matmul, quantized_weight
from orchestrator.networks.shape import RankShape
from orchestrator.quantizers import QUANTIZERS
from orchestrator.quantizers.formats import pack_rows, unpack_rows
from orchestrator.work.binding import bind, bind_portable
from orchestrator.work.shards import Weight
from orchestrator.work.verify.ort import ort_value
from tests.support.synthetic import model_config

PREFIX = "transformer.layers.0.mlp.fc"
OUT, IN = 32, 256
Array = npt.NDArray[np.float32]
FORMATS = {name: quantizer.linear for name, quantizer in QUANTIZERS.items()}


def stage(fmt: LinearFormat) -> StageOptions:
    quantization = ModelQuantization(algorithm=fmt.algorithm, linear=fmt)
    return StageOptions.of(model_config(dtype="float32"), Topology(1, 1), 0, quantization)


class Packed:
    """A seeded weight as a rank's file would hold it, and what it stands for."""

    def __init__(self, fmt: LinearFormat, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(OUT, IN, generator=generator).to(torch.bfloat16)
        amax = float(weight.abs().max())
        found = pack_rows(weight, fmt, amax)
        self.values = unpack_rows(found.weight, fmt, found.scales, amax).double()
        self.vector = torch.rand(IN, generator=generator) + 0.5
        self.input_amax = 3.0
        dtype, shape = packed(fmt, (OUT, IN))
        self.tensors = {f"{PREFIX}.weight": Weight(dtype, shape, _bytes(found.weight))}
        for scale in scale_tensors(fmt, (OUT, IN), "F32"):
            value = {
                "weight": found.scales,
                "weight_amax": torch.full(scale.shape, amax) / scale.divisor,
                "input_amax": torch.full(scale.shape, self.input_amax) / scale.divisor,
                "pre_quant_scale": self.vector,
            }[scale.origin]
            assert value is not None
            self.tensors[f"{PREFIX}.{scale.suffix}"] = Weight(scale.dtype, scale.shape, _bytes(value))


def _bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def run(graph: GraphWriter, tensors: dict[str, Weight], x: Array) -> Array:
    network = Network(graph.model(), {}, graph.unpacked_weights)
    bound = {name: ort_value(value, kind) for name, (value, kind) in bind_portable(network, tensors).items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_external_initializers(list(bound), list(bound.values()))
    session = onnxruntime.InferenceSession(network.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def linear_graph(fmt: LinearFormat, *, portable: bool, dtype: str = "float32") -> GraphWriter:
    graph = GraphWriter("linear")
    graph.input("x", dtype, ["batch", "tokens", IN])
    graph.node("Identity", [quantized_matmul(graph, RankShape(stage(fmt), dtype, 0, portable), "x", PREFIX, (OUT, IN), fmt)], "y")
    graph.output("y", dtype, ["batch", "tokens", OUT])
    return graph


def rounded_input(fmt: LinearFormat, weight: Packed, x: torch.Tensor) -> torch.Tensor:
    """What the product sees of x, computed with torch and Model Optimizer."""
    if fmt.pre_quant_scale:
        x = x * weight.vector
    match fmt.activation:
        case ActivationFormat.NONE:
            return x.double()
        case ActivationFormat.INT8_TENSOR:
            scale = torch.tensor(weight.input_amax) / 127
            return (x / scale).round().clamp(-128, 127).double() * scale.double()
        case ActivationFormat.FP8_TENSOR:
            scale = torch.tensor(weight.input_amax) / 448
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
        case ActivationFormat.FP8_TOKEN:
            scale = x.abs().amax(dim=-1, keepdim=True) / 448
            return (x / scale).to(torch.float8_e4m3fn).double() * scale.double()
        case ActivationFormat.NVFP4:
            second = torch.tensor(weight.input_amax) / (6 * 448)
            quantized, scales, _ = NVFP4QTensor.quantize(x.clone(), 16, None, second)
            return quantized.dequantize(torch.float32, scale=scales, double_scale=second, block_sizes={-1: 16}).double()
        case ActivationFormat.MXFP8:
            stored, scales = MXFP8QTensor.quantize(x)
            return stored.dequantize(torch.float32, scale=scales, block_sizes={-1: 32}).double()


def inputs(seed: int = 5) -> torch.Tensor:
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(seed))
    x[0, 0, :64] = 0.0  # blocks of zeros
    x[0, 1] *= 1e-3
    x[1, 2, 7] = 2.9
    return x


@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_quantized_matmul_portable_graph_computes_with_the_packed_numbers(algorithm: str) -> None:
    fmt = FORMATS[algorithm]
    weight, x = Packed(fmt), inputs()
    expected = rounded_input(fmt, weight, x) @ weight.values.T
    found = run(linear_graph(fmt, portable=True), weight.tensors, x.numpy())
    assert np.abs(found - expected.numpy()).max() < 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("algorithm", ["NVFP4", "MXFP8"])
def test_quantized_input_portable_equivalent_is_modelopts_rounding_bit_for_bit(algorithm: str) -> None:
    fmt = FORMATS[algorithm]
    weight = Packed(fmt)
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 448.0])
    ties = torch.cat([levels, -levels]).repeat(IN // 32)
    powers = 2.0 ** torch.arange(-40, 24).float()
    cases = torch.stack([ties, ties * 2.0**-9, ties * 1.0000001, powers.repeat(IN // 64), torch.zeros(IN)])
    x = torch.cat([cases[None], torch.randn(1, 5, IN) * torch.logspace(-6, 6, 5)[None, :, None]])
    if algorithm == "NVFP4":
        x = x.clamp(-weight.input_amax, weight.input_amax)
    graph = GraphWriter("input")
    graph.input("x", "float32", ["batch", "tokens", IN])
    rounded, factor = quantized_input(graph, RankShape(stage(fmt), "float32", 0, portable=True), "x", PREFIX, IN, fmt)
    assert factor is None
    graph.node("Identity", [rounded], "y")
    graph.output("y", "float32", ["batch", "tokens", IN])
    assert np.array_equal(run(graph, weight.tensors, x.numpy()), rounded_input(fmt, weight, x).float().numpy())


@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_quantized_weight_of_experts_is_each_expert_dequantized_with_its_own_scales(algorithm: str) -> None:
    fmt = FORMATS[algorithm].model_copy(update={"pre_quant_scale": False})
    one, two = Packed(fmt, 1), Packed(fmt, 2)
    tensors = {name: _stacked(name, one.tensors[name], two.tensors[name]) for name in one.tensors if "activation" not in name}
    graph = GraphWriter("experts")
    graph.input("x", "float32", [1])
    name = quantized_weight(graph, RankShape(stage(fmt), "float32", 0, portable=True), PREFIX, (OUT, IN), fmt, experts=2)
    graph.node("Identity", [name], "y")
    graph.output("y", "float32", [2, OUT, IN])
    found = run(graph, tensors, np.zeros(1, np.float32))
    expected = torch.stack([one.values, two.values]).numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def _stacked(name: str, one: Weight, two: Weight) -> Weight:
    shape = (2, 1) if one.shape == (1,) else (2, *one.shape)
    assert not name.endswith("prequant_scaling_factor")
    return Weight(one.dtype, shape, np.concatenate([one.data, two.data]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("algorithm", QUANTIZERS)
def test_quantized_matmul_compiles_in_the_models_dtype(algorithm: str, dtype: str) -> None:
    import tensorrt_rtx as trt

    fmt = FORMATS[algorithm]
    graph = linear_graph(fmt, portable=False, dtype=dtype)
    network = Network(graph.model(), {}, graph.unpacked_weights)
    bound = bind(network, {name: _in_dtype(weight, name, dtype) for name, weight in Packed(fmt).tensors.items()}, dtype)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, logger)
    assert parser.load_model_proto(network.model.SerializeToString())
    for name, value in bound.items():
        assert parser.load_initializer(name, value.ctypes.data, value.nbytes)
    assert parser.parse_model_proto(), [parser.get_error(number).desc() for number in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, IN), (1, 4, IN), (2, 8, IN))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(definition, config) is not None


def _in_dtype(weight: Weight, name: str, dtype: str) -> Weight:
    """pre_quant_scale stands in the model's dtype in a rank's file."""
    if not name.endswith("prequant_scaling_factor"):
        return weight
    kind = getattr(torch, dtype)
    narrow = torch.from_numpy(weight.data.view(np.float32).copy()).to(kind)
    return Weight({"float16": "F16", "bfloat16": "BF16"}[dtype], weight.shape, _bytes(narrow))


def test_portable_graph_has_standard_operators_only() -> None:
    for fmt in FORMATS.values():
        assert {node.domain for node in linear_graph(fmt, portable=True).model().graph.node} == {""}


def test_weight_formats_are_all_covered_by_an_algorithm() -> None:
    assert {fmt.weight for fmt in FORMATS.values()} == set(WeightFormat)
    assert {fmt.activation for fmt in FORMATS.values()} == set(ActivationFormat)


@pytest.mark.parametrize("kv_cache", ["INT8", "FP8"])
def test_update_cache_quantized_writes_its_slots_and_leaves_the_others(kv_cache: Literal["INT8", "FP8"]) -> None:
    config = model_config(dtype="float32", num_attention_heads=4, num_key_value_heads=2, head_size=4)
    quantization = ModelQuantization(algorithm=None, kv_cache=kv_cache)
    shape = RankShape(StageOptions.of(config, Topology(1, 1), 0, quantization), "float32", 0, portable=True)
    graph = GraphWriter("cache")
    graph.input("position_ids", "int64", ["batch", "tokens"])
    graph.input("write_indices", "int64", ["batch"])
    graph.input("past_key_values.0.key", shape.cache_dtype, ["batch", 2, "slots", 4])
    graph.input("update", "float32", ["batch", 2, "tokens", 4])
    causal_mask(graph, "position_ids", "past_key_values.0.key")
    graph.node("Identity", [update_cache(graph, shape, 0, "key", "update")], "all")
    graph.output("all", "float32", ["batch", 2, "slots", 4])
    graph.output("present_key_values.0.key", shape.cache_dtype, ["batch", 2, "slots", 4])
    generator = torch.Generator().manual_seed(1)
    past, update = torch.randn(2, 2, 6, 4, generator=generator), torch.randn(2, 2, 2, 4, generator=generator)
    scale = np.array(0.02, np.float32)
    stored = stored_cache(past, float(scale), kv_cache)
    kind = onnx.TensorProto.INT8 if kv_cache == "INT8" else onnx.TensorProto.FLOAT8E4M3FN
    options = onnxruntime.SessionOptions()
    values = [ort_value(scale)]
    options.add_external_initializers(["transformer.layers.0.attention.k_cache_scaling_factor"], values)
    session = onnxruntime.InferenceSession(graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {
        "position_ids": ort_value(np.array([[1, 2], [3, 4]])),
        "write_indices": ort_value(np.array([1, 3])),
        "past_key_values.0.key": ort_value(stored.view(torch.uint8 if kv_cache == "FP8" else torch.int8).numpy(), kind),
        "update": ort_value(update.numpy()),
    }
    found = session.run_with_ort_values(["all"], feeds)[0].numpy()
    expected = stored.float() * float(scale)
    new = stored_cache(update, float(scale), kv_cache).float() * float(scale)
    expected[0, :, 1:3], expected[1, :, 3:5] = new[0], new[1]
    assert np.allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_update_cache_in_place_and_as_a_whole_write_the_same_slots(in_place: bool) -> None:
    config = model_config(dtype="float32", num_attention_heads=4, num_key_value_heads=2, head_size=4)
    shape = RankShape(StageOptions.of(config, Topology(1, 1), 0), "float32", 0, in_place=in_place)
    graph = GraphWriter("cache")
    graph.input("position_ids", "int64", ["batch", "tokens"])
    graph.input("write_indices", "int64", ["batch"])
    graph.input("past_key_values.0.key", "float32", ["batch", 2, "slots", 4])
    graph.input("update", "float32", ["batch", 2, "tokens", 4])
    causal_mask(graph, "position_ids", "past_key_values.0.key")
    assert update_cache(graph, shape, 0, "key", "update") == "present_key_values.0.key"
    graph.output("present_key_values.0.key", "float32", ["batch", 2, "slots", 4])
    assert ("TensorScatter" in {node.op_type for node in graph.model().graph.node}) == in_place
    generator = np.random.default_rng(1)
    past, update = generator.standard_normal((2, 2, 6, 4), np.float32), generator.standard_normal((2, 2, 2, 4), np.float32)
    session = onnxruntime.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])
    places = {"position_ids": np.array([[1, 2], [3, 4]]), "write_indices": np.array([1, 3])}
    feeds = {**places, "past_key_values.0.key": past, "update": update}
    found = session.run(["present_key_values.0.key"], feeds)[0]
    expected = past.copy()
    expected[0, :, 1:3], expected[1, :, 3:5] = update[0], update[1]
    np.testing.assert_array_equal(found, expected)


def stored_cache(values: torch.Tensor, scale: float, kv_cache: str) -> torch.Tensor:
    if kv_cache == "INT8":
        return (values / scale).round().clamp(-128, 127).to(torch.int8)
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("experts", [0, 2])
def test_quantized_weight_nvfp4_as_tensorrt_gets_it_is_the_weight_that_was_packed(experts: int) -> None:
    """ONNX Runtime has no FP4, so the portable graph binds these weights dequantized; ONNX's reference runs the compiled form."""
    fmt = FORMATS["W4A16_NVFP4"]
    one, two = Packed(fmt, 1), Packed(fmt, 2)
    tensors = {name: _stacked(name, one.tensors[name], two.tensors[name]) for name in one.tensors} if experts else one.tensors
    graph = GraphWriter("weight")
    name = quantized_weight(graph, RankShape(stage(fmt), "float32"), PREFIX, (OUT, IN), fmt, experts)
    graph.node("Identity", [name], "y")
    graph.output("y", "float32", [2, OUT, IN] if experts else [OUT, IN])
    network = Network(graph.model(), {}, graph.unpacked_weights)
    bound = bind(network, tensors, "float32")
    for tensor in network.model.graph.initializer:
        if tensor.name in bound:
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = bound[tensor.name].tobytes()
    found = ReferenceEvaluator(network.model).run(None, {})[0]
    expected = torch.stack([one.values, two.values]).numpy() if experts else one.values.numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
