"""Whole quantized models, from the packed rank files: executed by ONNX Runtime, and compiled by TensorRT-RTX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.base.errors import EngineBuildError, QuantizationError
from orchestrator.engines.record import EngineRecord
from orchestrator.model.compute_capability import check_target
from orchestrator.model.stage import ExpertForm, StageNetwork
from orchestrator.planning import preparation
from orchestrator.planning.options import BuildOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.quantizers import QUANTIZERS
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from orchestrator.work.build.step import compile_rank
from orchestrator.work.shards import map_checkpoint_rank
from orchestrator.work.verify.inputs import make_calls, positions_of
from orchestrator.work.verify.lockstep import Lockstep
from tests.support.artifact import write_artifact
from tests.support.fake_quant import FakeQuantDecoder
from tests.support.families import write_tiny
from tests.support.here import convert_here

Case = tuple[str | None, str | None]
"""Algorithm, KV cache."""
CASES: list[Case] = [
    *((algorithm, None) for algorithm in QUANTIZERS),
    ("W4A16", "INT8"), ("W4A16", "FP8"), ("FP8", "INT8"), ("FP8", "FP8"), (None, "FP8"),
]  # fmt: skip
EXACT = [("W8A16", None), ("W4A16", None), ("W4A16_AWQ", None), ("W4A16_NVFP4", None)]
"""Nothing is rounded at run time."""
DECODE_STEPS = 3


def case_id(case: Case) -> str:
    algorithm, kv_cache = case
    return "-".join([*([algorithm] if algorithm else []), *([f"cache-{kv_cache}"] if kv_cache else [])]) or "plain"


def spec_of(source: Path, artifact: Path, case: Case, tp: int, **quantization: Any) -> BuildSpec:
    algorithm, kv_cache = case
    asked: dict[str, Any] = {"scales": str(artifact), **quantization}
    if algorithm is not None and QUANTIZERS[algorithm].linear.weight.value.startswith("int4"):
        asked.setdefault("group_size", 32)
    sections: dict[str, Any] = {"quantization": {"algorithm": algorithm, "kv_cache": kv_cache, **asked}} if any(case) else {}
    return decode(
        BuildSpec,
        {
            "source": {"path": str(source)}, "topology": {"tp": tp}, "release": {"name": "tiny", "version": "1"},
            "engine": {"max_batch_size": 2, "max_input_len": 8, "max_seq_len": 32}, **sections,
        },
        "spec",
    )  # fmt: skip


class Models:
    """A source, its artifact, and its checkpoints in every format, each converted once."""

    def __init__(self, source: Path, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._artifact = write_artifact(source, folder / "artifact")
        self.checkpoint = functools.cache(self._checkpoint)

    def plan(self, case: Case, tp: int) -> Plan:
        return preparation.plan(spec_of(self._source, self._artifact, case, tp))

    def _checkpoint(self, case: Case, tp: int) -> Path:
        output = self._folder / f"{case_id(case)}-tp{tp}"
        return convert_here(spec_of(self._source, self._artifact, case, tp), self._folder / "store", output)

    def network(self, case: Case, tp: int) -> StageNetwork:
        return BuildOptions.model_validate(next(self.plan(case, tp).of_kind(Kind.BUILD)).options).network

    def compile(
        self,
        case: Case,
        tp: int,
        tp_rank: int,
        capabilities: tuple[str, ...] = (),
        experts: ExpertForm = "dense",
        max_batch_size: int = 2,
    ) -> tuple[EngineRecord, int]:
        """The record and the size in bytes of a rank's engine."""
        options = BuildOptions.model_validate(list(self.plan(case, tp).of_kind(Kind.BUILD))[tp_rank].options)
        engine = options.engine.model_copy(update={"compute_capabilities": capabilities, "max_batch_size": max_batch_size})
        options = options.model_copy(update={"engine": engine, "network": with_experts(options.network, experts)})
        weights, sizes = map_checkpoint_rank(self.checkpoint(case, tp), tp_rank), list[int]()
        record = compile_rank(options, weights, lambda data: sizes.append(len(data)), lambda *_: None, lambda line: None)
        return record, sum(sizes)


def with_experts(network: StageNetwork, form: ExpertForm) -> StageNetwork:
    return network.model_copy(update={"experts": form})


ModelsOf = Callable[[str], Models]


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> ModelsOf:
    """The models of a family, each written once. Every size is a multiple of 32 on each of two ranks."""
    changes = {
        "llama": {"num_hidden_layers": 2, "intermediate_size": 128},
        "mixtral": {"num_hidden_layers": 1, "intermediate_size": 64},
        "phi3": {"num_hidden_layers": 1, "intermediate_size": 128},
        "qwen2_moe": {"num_hidden_layers": 1, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        "deepseek_v3": {
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "first_k_dense_replace": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "head_dim": 16,
            "v_head_dim": 32,
        },
        # Linears that outweigh what every engine holds besides them.
        "large": {"num_hidden_layers": 1, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 256},
        "large_moe": {"num_hidden_layers": 1, "hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8},
    }

    @functools.cache
    def models(name: str) -> Models:
        folder = tmp_path_factory.mktemp(name)
        family = {"large": "llama", "large_moe": "mixtral"}.get(name, name)
        return Models(write_tiny(family, folder / "source", **changes[name]), folder)

    return models


TOKENS = np.random.default_rng(9).integers(3, 131, (2, 12))
LENGTHS = np.array([12, 8])
"""The shorter sequence decodes from slots that the longer one has filled in prefill."""


def execute(models: Models, case: Case, tp: int, experts: ExpertForm = "dense") -> list[npt.NDArray[Any]]:
    """A case's logits by call, of `tp` ranks in lockstep; the last call repeats a step for one sequence alone."""
    shards = [map_checkpoint_rank(models.checkpoint(case, tp), rank) for rank in range(tp)]
    calls = make_calls(TOKENS, LENGTHS, DECODE_STEPS, [1])
    return Lockstep(with_experts(models.network(case, tp), experts), shards, calls, []).run()


def relative_errors(results: list[npt.NDArray[Any]], expected: torch.Tensor) -> npt.NDArray[np.float64]:
    """Of each position: max |logit - expected| / max |expected|."""
    theirs = expected.numpy()

    def errors() -> Iterator[float]:
        for sequence, position, call, row in positions_of(LENGTHS, DECODE_STEPS):
            wanted = theirs[sequence, position]
            yield float(np.abs(results[call][sequence, row] - wanted).max() / np.abs(wanted).max())

    return np.array(list(errors()))


MODELS: list[tuple[str, int, tuple[Case, ...]]] = [
    ("llama", 1, tuple(CASES)), ("llama", 2, tuple(CASES)), ("mixtral", 2, tuple((algorithm, None) for algorithm in QUANTIZERS)),
    ("qwen2_moe", 1, (("FP8", None), ("W4A8_AWQ", None), ("NVFP4", None))),
    ("phi3", 2, tuple((algorithm, None) for algorithm in QUANTIZERS)),
    ("deepseek_v3", 2, tuple((algorithm, None) for algorithm in QUANTIZERS)),
]  # fmt: skip
"""Family, tensor-parallel size, cases."""


@pytest.mark.parametrize(
    ("family", "tp", "case"),
    [pytest.param(family, tp, case, id=f"{family}-tp{tp}-{case_id(case)}") for family, tp, cases in MODELS for case in cases],
)
def test_quantized_model_portable_graph_computes_what_fake_quantization_does(
    family: str, tp: int, case: Case, models_of: ModelsOf
) -> None:
    """Near-exact where only weights are rounded.

    Where activations or the cache are, both sides round numbers that differ in the last bit; now and then one lies on a tie and
    falls to different sides (once in all of these cases: 3e-5). A fault moves every position: those tried moved the median
    by 2e-2 and more.
    """
    models = models_of(family)
    stage = models.network(case, tp).stage
    ranks = [load_file(models.checkpoint(case, tp) / f"rank{rank}.safetensors") for rank in range(tp)]
    expected = FakeQuantDecoder(stage.config, stage.quantization, ranks).logits(torch.from_numpy(TOKENS))
    errors = relative_errors(execute(models, case, tp), expected)
    if case in EXACT:
        assert errors.max() < 1e-5
    else:
        assert np.median(errors) < 1e-5
        assert errors.max() < 0.05


@pytest.mark.parametrize("algorithm", [None, *QUANTIZERS])
def test_quantized_mixture_that_gathers_its_experts_computes_what_the_dense_form_does(
    algorithm: str | None, models_of: ModelsOf
) -> None:
    """All experts in the prefill, half of them in the call of one sequence."""
    results = [execute(models_of("mixtral"), (algorithm, None), 2, form) for form in ("dense", "gathered")]
    for dense, gathered in zip(*results, strict=True):
        assert np.abs(gathered - dense).max() < 1e-6 * np.abs(dense).max()


@pytest.mark.parametrize("algorithm", [None, "FP8", "W4A16_AWQ", "NVFP4"])
def test_quantized_mixture_that_gathers_its_experts_is_compiled(algorithm: str | None, models_of: ModelsOf) -> None:
    """In as few bytes as the dense form: neither weights that are kept twice, nor weights that are stored dequantized."""
    models = models_of("large_moe")
    (_, dense), (_, gathered) = (models.compile((algorithm, None), 1, 0, ("12.0",), form) for form in ("dense", "gathered"))
    assert gathered < dense + 1_000_000  # kernels, whatever the size of the weights


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2", "ernie4_5_moe"])
def test_quantized_mixture_computes_what_transformers_does_with_the_same_rounded_weights(family: str, tmp_path: Path) -> None:
    """INT8 per row, in dense layers, experts and shared experts; routers and their biases are not rounded."""
    import transformers

    models = Models(write_tiny(family, tmp_path / "source"), tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() > 1 and not name.endswith("mlp.gate.weight") and "statics" not in name:
                scale = parameter.abs().amax(-1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round().clamp(-127, 127) * scale)
        expected = model(torch.from_numpy(TOKENS)).logits
    assert relative_errors(execute(models, ("W8A16", None), 2), expected).max() < 1e-5


@pytest.mark.parametrize(("tp", "tp_rank"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_quantized_model_is_compiled_and_its_cache_described(case: Case, tp: int, tp_rank: int, models_of: ModelsOf) -> None:
    record, _ = models_of("qwen2_moe" if tp == 1 and case[1] is None else "llama").compile(case, tp, tp_rank)
    tensors = {tensor.name: tensor for tensor in record.tensors}
    past, present = tensors["past_key_values.0.key"], tensors["present_key_values.0.key"]
    assert past.dtype == present.dtype == {None: "bf16", "INT8": "int8", "FP8": "fp8"}[case[1]]
    # A quantized cache is not updated in place: a consumer that bound both to the same memory would read what is being written.
    assert present.aliases == (None if case[1] else "past_key_values.0.key")


@pytest.mark.parametrize(("model", "algorithm"), [("large", "W4A16"), ("large", "W4A16_NVFP4"), ("large_moe", "W4A16")])
def test_engine_of_four_bit_weights_stays_small(model: str, algorithm: str, models_of: ModelsOf) -> None:
    """Folded into the model's dtype the weights alone would be as many bytes as those of the unquantized engine."""
    models = models_of(model)
    (_, plain), (_, small) = (models.compile(case, 1, 0) for case in ((None, None), (algorithm, None)))
    assert small < 0.45 * plain


@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
@pytest.mark.parametrize("algorithm", [None, "FP8", "W4A16"])
@pytest.mark.parametrize("model", ["large", "large_moe"])
def test_engine_stores_each_weight_once(model: str, algorithm: str | None, max_batch_size: int, models_of: ModelsOf) -> None:
    """For both profiles, whatever the batch; the rest is room for kernels."""
    models = models_of(model)
    weights = map_checkpoint_rank(models.checkpoint((algorithm, None), 1), 0)
    stored = sum(weight.data.size for weight in weights.values())
    _, size = models.compile((algorithm, None), 1, 0, max_batch_size=max_batch_size)
    assert size < 1.1 * stored + 6_000_000


@pytest.mark.parametrize(
    ("case", "refused", "taken"),
    [
        (("FP8", None), "8.6", "8.9"),
        (("W4A16", None), "7.5", "8.0"),
        (("W4A16_NVFP4", None), "8.9", "12.0"),
        ((None, "FP8"), "8.6", "8.9"),
    ],
)
def test_tensorrt_refuses_the_gpus_that_check_target_refuses(case: Case, refused: str, taken: str, models_of: ModelsOf) -> None:
    models = models_of("llama")
    quantization = models.network(case, 1).stage.quantization
    with pytest.raises(EngineBuildError, match="HW-specific data"):
        models.compile(case, 1, 0, (refused,))
    with pytest.raises(QuantizationError):
        check_target(quantization, [refused])
    models.compile(case, 1, 0, (taken,))
    check_target(quantization, [taken])
