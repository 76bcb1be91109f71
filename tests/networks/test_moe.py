"""The network of a mixture against the modules of transformers: routers, shared experts, what an expert computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from orchestrator.model.config import MoeConfig
from orchestrator.model.stage import ExpertForm, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.moe import moe_mlp
from orchestrator.networks.portable_experts import has_portable_layer
from orchestrator.networks.shape import RankShape
from tests.support.synthetic import model_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HIDDEN, SIZE, EXPERTS, CHOSEN = 24, 12, 12, 3
PREFIX = "mlp"
Arrays = dict[str, npt.NDArray[np.float32]]
GROUPED = {"num_groups": 4, "kept_groups": 2}
SIGMOID: dict[str, Any] = {"scoring": "sigmoid", "selection_bias": True, "sum_epsilon": 1e-20, "routed_scale": 2.5, **GROUPED}
GPT_OSS: dict[str, Any] = {
    "scoring": "softmax_of_chosen", "normalization_mode": 0, "router_bias": True, "expert_bias": True,
    "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0,
}  # fmt: skip
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": SIZE}
DEEPSEEK = {**SIZES, "n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
ERNIE = {
    "hidden_size": HIDDEN, "moe_k": CHOSEN, "moe_num_experts": EXPERTS, "moe_intermediate_size": SIZE, "moe_num_shared_experts": 2,
}  # fmt: skip
WITHOUT_GATE = {"shared_expert_gate": False, "shared_expert_intermediate_size": 2 * SIZE}
CASES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "glm4_moe": (
        "glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig", {**DEEPSEEK, "n_shared_experts": 2}, {**SIGMOID, **WITHOUT_GATE}
    ),
    "deepseek_v3 without norm": (
        "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", {**DEEPSEEK, "n_shared_experts": 2, "norm_topk_prob": False},
        {**SIGMOID, **WITHOUT_GATE, "normalization_mode": 0},
    ),
    "mistral4": (
        "mistral4", "Mistral4MoE", "Mistral4Config", {**DEEPSEEK, "n_shared_experts": 2},
        {**GROUPED, **WITHOUT_GATE, "sum_epsilon": 1e-20, "routed_scale": 2.5},
    ),
    "qwen2_moe": (
        "qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig",
        {**SIZES, "num_experts": EXPERTS, "shared_expert_intermediate_size": 20, "norm_topk_prob": False},
        {"normalization_mode": 0, "shared_expert_intermediate_size": 20},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", "Ernie4_5_MoeConfig",
        ERNIE,
        {"selection_bias": True, "sum_minimum": 1e-12, **WITHOUT_GATE},
    ),
    "gpt_oss": (
        "gpt_oss", "GptOssMLP", "GptOssConfig",
        {"hidden_size": HIDDEN, "num_experts_per_tok": CHOSEN, "num_local_experts": EXPERTS, "intermediate_size": SIZE}, GPT_OSS,
    ),
    "phimoe": (
        "phimoe", "PhimoeSparseMoeBlock", "PhimoeConfig",
        {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "intermediate_size": SIZE, "router_jitter_noise": 0.2},
        {"top_k": 2, "scoring": "sparse_mixer", "normalization_mode": 0, "jitter": 0.2},
    ),
}  # fmt: skip
"""Model of transformers, module, config class, fields of the config, fields of MoeConfig."""


def module_of(case: str) -> Any:
    """A seeded module of transformers, with biases that decide and gates that reach the bounds."""
    import importlib

    kind, name, config_name, fields, _ = CASES[case]
    torch.manual_seed(5)
    config = getattr(transformers, config_name)(**fields)
    config._experts_implementation = "eager"
    module = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)(config).eval()
    with torch.no_grad():
        for values in (*module.parameters(), *module.buffers()):
            values.copy_(torch.randn_like(values) * (1.5 if values.dim() == 3 else 0.5))
    return module


def weights_of(module: Any) -> Arrays:
    """The module's weights by the names of a rank's file."""
    state = {name: values.detach().numpy() for name, values in (*module.named_parameters(), *module.named_buffers())}
    found: Arrays = {}
    for name, values in state.items():
        last = name.rpartition(".")[2]
        if name in ("gate.weight", "router.weight", "router.bias"):
            found[f"{PREFIX}.router.{last}"] = values
        elif last == "e_score_correction_bias":
            found[f"{PREFIX}.router.e_score_correction_bias"] = values.reshape(-1)
        elif name == "shared_expert_gate.weight":
            found[f"{PREFIX}.shared_expert_gate.weight"] = values
    experts = {name: state[f"experts.{name}"] for name in ("gate_up_proj", "down_proj")}
    if "experts.gate_up_proj_bias" in state:  # gpt-oss: [in, out], gate and up by turns
        both, down = (np.swapaxes(values, 1, 2) for values in experts.values())
        found[f"{PREFIX}.fc.weight"] = np.concatenate([both[:, 1::2], both[:, ::2]], 1)
        bias = state["experts.gate_up_proj_bias"]
        found[f"{PREFIX}.fc.bias"] = np.concatenate([bias[:, 1::2], bias[:, ::2]], 1)
        found |= {f"{PREFIX}.proj.weight": down, f"{PREFIX}.proj.bias": state["experts.down_proj_bias"]}
        return found
    gate, up = np.split(experts["gate_up_proj"], 2, axis=1)
    found |= {f"{PREFIX}.fc.weight": np.concatenate([up, gate], 1), f"{PREFIX}.proj.weight": experts["down_proj"]}
    shared = next((name for name in ("shared_expert", "shared_experts") if f"{name}.up_proj.weight" in state), None)
    if shared:
        joined = [state[f"{shared}.{name}_proj.weight"] for name in ("up", "gate")]
        found[f"{PREFIX}.shared_expert.fc.weight"] = np.concatenate(joined)
        found[f"{PREFIX}.shared_expert.proj.weight"] = state[f"{shared}.down_proj.weight"]
    return found


def part_of(name: str, values: npt.NDArray[np.float32], moe_tp: int, tp_rank: int, ep: int) -> npt.NDArray[np.float32]:
    """A rank's part of a weight, split by hand."""
    moe_rank, group = tp_rank // ep, tp_rank % ep
    short = name.removeprefix(f"{PREFIX}.")
    if short.startswith("shared_expert."):
        axis, ranks = (1, moe_tp * ep) if "proj" in short else (0, moe_tp * ep)
        halves = np.split(values, 2) if axis == 0 else [values]
        return np.concatenate([np.split(half, ranks, axis)[tp_rank] for half in halves])
    if not short.startswith(("fc.", "proj.")):
        return values
    mine = np.split(values, ep)[group]
    if short == "proj.bias":
        return mine
    if short == "proj.weight":
        return np.split(mine, moe_tp, 2)[moe_rank]
    return np.concatenate([np.split(half, moe_tp, 1)[moe_rank] for half in np.split(mine, 2, 1)], 1)


def run(
    moe: MoeConfig,
    weights: Mapping[str, npt.NDArray[np.float32]],
    x: npt.NDArray[np.float32],
    tp: int = 1,
    ep: int = 1,
    form: ExpertForm = "dense",
    *,
    for_genai: bool = False,
) -> Any:
    """The sum over the ranks of what the network of each computes. `for_genai`: as the portable graph has it."""
    config = model_config(hidden_size=HIDDEN, moe=moe, moe_intermediate_size=SIZE, hidden_act="silu")
    stage = StageOptions.of(config, Topology(tp, 1, moe_ep=ep), 0)
    total = np.zeros_like(x)
    for rank in range(tp):
        graph = GraphWriter("moe")
        graph.input("x", "float32", ["batch", "tokens", HIDDEN])
        shape = RankShape(stage, "float32", rank, portable=True, experts=form, runtime_layers=for_genai)
        result = moe_mlp(graph, shape, "x", PREFIX)
        assert any(node.op_type == "MoE" for node in graph.model().graph.node) == for_genai
        own = result.removesuffix(".all_reduce")
        graph.output(own, "float32", ["batch", "tokens", HIDDEN])
        model = graph.model()
        nodes = [node for node in model.graph.node if node.op_type != "DistCollective"]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        for initializer in model.graph.initializer:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                part = part_of(initializer.name, weights[initializer.name], tp // ep, rank, ep)
                assert list(part.shape) == list(initializer.dims), initializer.name
                initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(part), initializer.name))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        total += session.run(None, {"x": x})[0]
    return total


def mixture(case: str, **changes: Any) -> MoeConfig:
    return MoeConfig(**{"num_experts": EXPERTS, "top_k": CHOSEN, **CASES[case][4], **changes})


def compared(
    case: str,
    changes: Mapping[str, Any] | None = None,
    tp: int = 1,
    ep: int = 1,
    form: ExpertForm = "dense",
    size: tuple[int, int] = (2, 7),
    *,
    for_genai: bool = False,
) -> float:
    """The worst relative error; `changes` are fields of MoeConfig, `size` is (sequences, tokens)."""
    module = module_of(case)
    x = np.random.default_rng(9).normal(size=(*size, HIDDEN)).astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(x))
    wanted = (wanted[0] if isinstance(wanted, tuple) else wanted).numpy()
    moe = mixture(case, **(changes or {}))
    return float(np.abs(run(moe, weights_of(module), x, tp, ep, form, for_genai=for_genai) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES)
def test_mixture_computes_what_transformers_computes(case: str) -> None:
    assert compared(case) < 2e-6


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("case", ["glm4_moe", "gpt_oss", "phimoe"])
def test_mixture_on_several_ranks_sums_to_what_transformers_computes(case: str, tp: int, ep: int) -> None:
    assert compared(case, tp=tp, ep=ep) < 2e-6


@pytest.mark.parametrize("for_genai", [False, True], ids=["compiled", "portable"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (2, 7)])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("case", CASES)
def test_mixture_that_gathers_the_chosen_experts_computes_what_transformers_computes(
    case: str, tp: int, ep: int, size: tuple[int, int], for_genai: bool
) -> None:
    assert compared(case, tp=tp, ep=ep, form="gathered", size=size, for_genai=for_genai) < 2e-6


@pytest.mark.parametrize("changes", [{"weighs_input": True}, {"own_norms": True}, {"gated": False}], ids=str)
def test_experts_that_onnxruntimes_layer_does_not_have_are_gathered(changes: dict[str, Any]) -> None:
    moe = MoeConfig(num_experts=EXPERTS, top_k=CHOSEN, **changes)
    config = model_config(hidden_size=HIDDEN, moe=moe, moe_intermediate_size=SIZE, hidden_act="silu")
    shape = RankShape(StageOptions.of(config, Topology(1, 1), 0), "float32", experts="gathered", runtime_layers=True)
    assert not has_portable_layer(shape, PREFIX)


@given(
    local=st.integers(1, 6), ep=st.sampled_from([1, 2, 3]), moe_tp=st.sampled_from([1, 2]), share=st.floats(0, 1),
    size=st.tuples(st.integers(1, 3), st.integers(1, 5)), seed=st.integers(0, 2**16), bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_gathered_experts_compute_what_the_dense_form_does(
    local: int, ep: int, moe_tp: int, share: float, size: tuple[int, int], seed: int, bias: bool
) -> None:
    experts = local * ep
    moe = MoeConfig(num_experts=experts, top_k=max(1, round(share * experts)), expert_bias=bias)
    rng = np.random.default_rng(seed)
    shapes = {"router.weight": (experts, HIDDEN), "fc.weight": (experts, 2 * SIZE, HIDDEN), "proj.weight": (experts, HIDDEN, SIZE)}
    shapes |= {"fc.bias": (experts, 2 * SIZE), "proj.bias": (experts, HIDDEN)} if bias else {}
    weights = {f"{PREFIX}.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(*size, HIDDEN)).astype(np.float32)
    dense, gathered = (run(moe, weights, x, moe_tp * ep, ep, form) for form in ("dense", "gathered"))
    portable = run(moe, weights, x, moe_tp * ep, ep, "gathered", for_genai=True)
    # Results are of the order of ten. Those of an expert that is nearly off are small, and no more exact: a sigmoid near 0 is not.
    assert max(np.abs(found - dense).max() for found in (gathered, portable)) <= 2e-6 * max(np.abs(dense).max(), 10.0)


def computed_by_the_layer(
    moe: MoeConfig, weights: Mapping[str, npt.NDArray[np.float32]], x: npt.NDArray[np.float32], tp: int, ep: int
) -> Any:
    """The sum over the ranks of what TRT_MoE is documented to compute, of the operands that its node gets."""
    config = model_config(hidden_size=HIDDEN, moe=moe, moe_intermediate_size=SIZE, hidden_act="silu")
    stage = StageOptions.of(config, Topology(tp, 1, moe_ep=ep), 0)
    total = np.zeros_like(x)
    for rank in range(tp):
        graph = GraphWriter("layer")
        graph.input("x", "float32", ["batch", "tokens", HIDDEN])
        moe_mlp(graph, RankShape(stage, "float32", rank, experts="trt_moe"), "x", PREFIX)
        model = graph.model()
        (layer,) = (node for node in model.graph.node if node.op_type == "TRT_MoE")
        nodes = [node for node in model.graph.node if node.op_type not in ("TRT_MoE", "DistCollective")]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        for name in layer.input[1:]:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        for initializer in model.graph.initializer:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                part = part_of(initializer.name, weights[initializer.name], tp // ep, rank, ep)
                initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(part), initializer.name))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        numbers, scores, gate, up, down = session.run(list(layer.input[1:]), {"x": x})
        assert numbers.dtype == np.int32
        for batch, token, k in np.ndindex(*numbers.shape):
            expert, hidden = numbers[batch, token, k], x[batch, token]
            gated = hidden @ gate[expert]
            total[batch, token] += scores[batch, token, k] * ((gated / (1 + np.exp(-gated)) * (hidden @ up[expert])) @ down[expert])
    return total


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("case", ["glm4_moe", "qwen2_moe", "phimoe"])
def test_layer_of_experts_gets_operands_that_compute_what_the_dense_form_does(case: str, tp: int, ep: int) -> None:
    x = np.random.default_rng(9).normal(size=(2, 3, HIDDEN)).astype(np.float32)
    moe = mixture(case, shared_expert_intermediate_size=0)
    weights = weights_of(module_of(case))
    expected = run(moe, weights, x, tp, ep)
    assert np.abs(computed_by_the_layer(moe, weights, x, tp, ep) - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layer_of_experts_is_parsed_as_tensorrts_own_layer(dtype: str) -> None:
    """The parser of TensorRT-RTX knows the operator; its builder has no such layer."""
    trt = pytest.importorskip("tensorrt_rtx")
    moe = MoeConfig(num_experts=EXPERTS, top_k=CHOSEN)
    config = model_config(hidden_size=HIDDEN, moe=moe, moe_intermediate_size=SIZE, hidden_act="silu")
    graph = GraphWriter("layer")
    graph.input("x", dtype, ["batch", "tokens", HIDDEN])
    stage = StageOptions.of(config, Topology(1, 1), 0)
    graph.output(moe_mlp(graph, RankShape(stage, dtype, experts="trt_moe"), "x", PREFIX), dtype, ["batch", "tokens", HIDDEN])
    logger = trt.Logger(trt.Logger.Severity.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    model = graph.model()
    kept = [
        np.zeros(tuple(tensor.dims), np.float32 if tensor.data_type == onnx.TensorProto.FLOAT else np.uint16)
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert parser.load_model_proto(model.SerializeToString())
    names = [tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for name, array in zip(names, kept, strict=True):
        assert parser.load_initializer(name, array.ctypes.data, array.nbytes)
    assert parser.parse_model_proto(), [parser.get_error(number).desc() for number in range(parser.num_errors)]
    (layer,) = (layer for layer in map(network.get_layer, range(network.num_layers)) if layer.type == trt.LayerType.MOE)
    layer.__class__ = trt.IMoELayer
    assert layer.activation_type == trt.MoEActType.SILU
    assert [tuple(layer.get_input(number).shape) for number in (3, 4, 5)] == [
        (EXPERTS, HIDDEN, SIZE), (EXPERTS, HIDDEN, SIZE), (EXPERTS, SIZE, HIDDEN),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("glm4_moe", {"selection_bias": False}),
        ("glm4_moe", {"num_groups": 3}),
        ("glm4_moe", {"kept_groups": 3}),
        ("glm4_moe", {"kept_groups": 4}),
        ("glm4_moe", {"routed_scale": 1.0}),
        ("glm4_moe", {"normalization_mode": 0}),
        ("glm4_moe", {"scoring": "softmax"}),
        ("glm4_moe", {"shared_expert_intermediate_size": 0}),
        ("mistral4", {"kept_groups": 4}),
        ("gpt_oss", {"swiglu_limit": None}),
        ("gpt_oss", {"swiglu_limit": 6.0}),
        ("gpt_oss", {"swiglu_alpha": 1.0}),
        ("gpt_oss", {"swiglu_beta": 0.0}),
        ("gpt_oss", {"scoring": "softmax"}),
        ("gpt_oss", {"router_bias": False}),
        ("gpt_oss", {"expert_bias": False}),
        ("ernie4_5_moe", {"selection_bias": False}),
        ("ernie4_5_moe", {"normalization_mode": 0}),
        ("phimoe", {"scoring": "softmax"}),
        ("phimoe", {"scoring": "softmax_of_chosen"}),
        ("phimoe", {"normalization_mode": 1}),
        ("phimoe", {"jitter": 0.0}),
        ("phimoe", {"jitter": 0.1}),
    ],
)
def test_mixture_with_a_planted_mistake_differs_from_transformers(case: str, wrong: dict[str, Any]) -> None:
    assert compared(case, wrong) > 1e-2


@pytest.mark.parametrize("form", ["dense", "gathered"])
def test_experts_multiply_operands_of_equal_rank(form: ExpertForm) -> None:
    """ONNX Runtime 1.31 on CUDA multiplies [B, 1, S, H] by [E, H, W] wrongly where B equals E, so no product may broadcast so."""
    moe = MoeConfig(num_experts=EXPERTS, top_k=CHOSEN, **SIGMOID)
    config = model_config(hidden_size=HIDDEN, moe=moe, moe_intermediate_size=SIZE, hidden_act="silu")
    graph = GraphWriter("layer")
    graph.input("x", "float32", ["batch", "tokens", HIDDEN])
    shape = RankShape(StageOptions.of(config, Topology(1, 1), 0), "float32", experts=form)
    graph.output(moe_mlp(graph, shape, "x", PREFIX), "float32", ["batch", "tokens", HIDDEN])
    inferred = onnx.shape_inference.infer_shapes(graph.model()).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in [*inferred.value_info, *inferred.input]}
    products = [[ranks[name] for name in node.input] for node in inferred.node if node.op_type == "MatMul"]
    of_experts = [each for each in products if each[1] == 3]
    assert len(of_experts) >= 2
    assert all(left == right for left, right in of_experts)
