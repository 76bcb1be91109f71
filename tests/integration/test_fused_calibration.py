"""Calibration of experts that the source stores in tensors of all experts: what separate experts would give, to the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from orchestrator import families
from orchestrator.families.common_experts import fused_experts
from orchestrator.families.qwen import QWEN3_MOE
from orchestrator.model.quantization import LinearFormat
from orchestrator.model.rules import Layers
from orchestrator.planning import preparation
from orchestrator.planning.options import BuildOptions, CalibrateOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.quantizers import QUANTIZERS
from orchestrator.quantizers.calibration_data import calibration_tokens
from orchestrator.spec.build import BuildSpec
from orchestrator.work.shards import map_checkpoint_rank
from orchestrator.work.verify.inputs import make_calls
from orchestrator.work.verify.lockstep import Lockstep
from tests.integration.test_quantized_models import DECODE_STEPS, LENGTHS, TOKENS, relative_errors
from tests.integration.test_quantized_sources import write_gpt_oss_in_mxfp4
from tests.support.fake_quant import Rank, _of_expert, dequantized, rounded
from tests.support.families import write_tiny
from tests.support.here import convert_here, run_here, scales_of
from tests.support.synthetic import build_spec

Scales = dict[str, torch.Tensor]


def spec_of(
    source: Path, algorithm: str, topology: dict[str, int] | None = None, exclude: list[str] | None = None, **calibration: Any
) -> BuildSpec:
    asked: dict[str, Any] = {"algorithm": algorithm, "exclude": exclude}
    if algorithm.endswith("AWQ"):
        asked["group_size"] = 16
    asked["calibration"] = {"num_samples": 4, "max_length": 12, "batch_size": 2, **calibration}
    return build_spec(source, topology=topology or {"tp": 1}, quantization=asked)


def calibrated(plan: Plan, store: Path) -> Scales:
    outcomes = run_here(plan, store, [Kind.CALIBRATE]).values()
    return {name: value for outcome in outcomes for name, value in scales_of(outcome, store).items()}


def assert_same(found: Scales, expected: Scales) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: calibrations of one kind are done once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Qwen3 MoE with separate experts, as its family stores them, and with the same weights in tensors of all experts."""
    folder = tmp_path_factory.mktemp("twins")
    separate = write_tiny("qwen3_moe", folder / "separate", num_hidden_layers=2)
    tensors = load_file(separate / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        names = ([f"{prefix}{expert}.{name}_proj.weight" for expert in range(4)] for name in ("gate", "up", "down"))
        gate, up, down = (torch.stack([tensors.pop(name) for name in each]) for each in names)
        tensors |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    (folder / "fused").mkdir()
    save_file(tensors, folder / "fused" / "model.safetensors", {"format": "pt"})
    (folder / "fused" / "config.json").write_bytes((separate / "config.json").read_bytes())
    return separate, folder / "fused"


def store_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the family store its experts in tensors of all experts."""
    rules = fused_experts("mlp.gate", "mlp.experts")
    experts = [rule for rule in rules if rule.layers is Layers.EXPERTS]
    others = [rule for rule in QWEN3_MOE.rules if rule.layers is not Layers.EXPERTS]
    monkeypatch.setitem(families.FAMILIES, "qwen3_moe", replace(QWEN3_MOE, rules=(*others[:-2], *experts, *others[-2:])))


@pytest.mark.parametrize("algorithm", ["FP8", "W4A16_AWQ", "NVFP4"])
@pytest.mark.parametrize("topology", [{"tp": 2, "moe_ep": 2}, {"tp": 2}], ids=str)
def test_fused_experts_get_the_scales_and_rank_files_of_the_same_separate_ones(
    algorithm: str, topology: dict[str, int], twins: tuple[Path, Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    separate, fused = twins
    expected = calibrated(preparation.plan(spec_of(separate, algorithm, topology)), store)
    convert_here(spec_of(separate, algorithm, topology), store, tmp_path / "separate")
    store_fused(monkeypatch)
    found = calibrated(preparation.plan(spec_of(fused, algorithm, topology)), store)
    places = {"gate_proj": "gate_up_proj.{}.0", "up_proj": "gate_up_proj.{}.32", "down_proj": "down_proj.{}.0"}
    for name in list(expected):
        if ".experts." in name:
            module, _, quantity = name.rpartition(".")
            prefix, expert, linear = module.rsplit(".", 2)
            expected[f"{prefix}.{places[linear].format(expert)}.{quantity}"] = expected.pop(name)
    assert_same(found, expected)
    convert_here(spec_of(fused, algorithm, topology), store, tmp_path / "fused")
    for rank in range(2):
        ours, theirs = (tmp_path / kind / f"rank{rank}.safetensors" for kind in ("fused", "separate"))
        assert ours.read_bytes() == theirs.read_bytes()


FUSED: dict[str, tuple[str, tuple[slice, slice]]] = {
    "llama4": ("feed_forward.experts", (slice(32), slice(32, None))),
    "gpt_oss": ("mlp.experts", (slice(0, None, 2), slice(1, None, 2))),
}
"""Family -> its experts' name in a layer, and the columns of gate and of up, whose modules are named by the first."""
SIZES: dict[str, dict[str, Any]] = {
    "llama4": {"num_hidden_layers": 2, "interleave_moe_layer_step": 1, "num_local_experts": 4},
    "gpt_oss": {"num_hidden_layers": 2, "num_local_experts": 4},
}


@pytest.fixture(scope="module", params=list(FUSED))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family whose experts are stored as [in, out], and a tiny model of it."""
    return request.param, write_tiny(request.param, tmp_path_factory.mktemp(request.param) / "source", **SIZES[request.param])


def test_fused_experts_stored_as_in_out_get_the_amax_of_their_own_weights_and_inputs(source: tuple[str, Path], store: Path) -> None:
    """Weights sliced by hand, inputs as the unchanged model of transformers gives them to its experts."""
    family, folder = source
    found = calibrated(preparation.plan(spec_of(folder, "FP8")), store)
    tensors, inputs = load_file(folder / "model.safetensors"), expert_inputs(folder)
    for layer in range(2):
        prefix = f"model.layers.{layer}.{FUSED[family][0]}"
        for expert, down in enumerate(tensors[f"{prefix}.down_proj"]):
            assert found[f"{prefix}.down_proj.{expert}.0.weight_amax"] == down.abs().max()
            for columns in FUSED[family][1]:
                module = f"{prefix}.gate_up_proj.{expert}.{columns.start or 0}"
                assert found[f"{module}.weight_amax"] == tensors[f"{prefix}.gate_up_proj"][expert][:, columns].abs().max()
        names = [name for name in found if name.startswith(f"{prefix}.gate_up") and name.endswith("input_amax")]
        assert len(names) == 8
        assert max(float(found[name]) for name in names) == pytest.approx(inputs[layer], rel=0.02)


def expert_inputs(folder: Path) -> list[float]:
    """Return the largest input of the experts of each layer, weighed where the family weighs inputs."""
    options = CalibrateOptions.model_validate(next(iter(preparation.plan(spec_of(folder, "FP8")).of_kind(Kind.CALIBRATE))).options)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found: list[float] = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            module.register_forward_pre_hook(lambda _module, args: found.append(float(args[0].abs().max())))
    with torch.inference_mode():
        model(torch.from_numpy(calibration_tokens(options.data, "", folder, model.config.vocab_size)), use_cache=False)
    return found


def test_fused_experts_calibrated_part_by_part_and_layer_by_layer_get_the_scales_of_the_whole(
    source: tuple[str, Path], store: Path
) -> None:
    _, folder = source
    expected = calibrated(preparation.plan(spec_of(folder, "FP8")), store)
    assert_same(calibrated(preparation.plan(spec_of(folder, "FP8", num_stages=2, layerwise=True)), store), expected)


class RoundedExperts(torch.nn.Module):
    """Experts of a layer as the engine's rank files hold them, with their inputs rounded."""

    def __init__(self, family: str, ranks: list[Rank], prefix: str, fmt: LinearFormat) -> None:
        super().__init__()
        self._family, self._prefix, self._fmt = family, prefix, fmt
        self._experts = [(_of_expert(rank, prefix, number), number) for rank in ranks for number in range(2)]

    def forward(self, hidden_states: Any, chosen: Any = None, weights: Any = None) -> Any:
        if chosen is None:
            inputs = hidden_states.view(4, -1, hidden_states.shape[-1])
            return torch.cat([self._expert(x, *expert) for x, expert in zip(inputs, self._experts, strict=True)])
        results = [self._expert(hidden_states, *expert) for expert in self._experts]
        return sum((weights * (chosen == number)).sum(-1, keepdim=True) * each for number, each in enumerate(results))

    def _expert(self, x: Any, tensors: Rank, number: int) -> Any:
        up, gate = self._linear(x, tensors, number, "fc").chunk(2, dim=-1)
        if self._family == "llama4":
            return self._linear(torch.nn.functional.silu(gate) * up, tensors, number, "proj")
        gate = gate.clamp(max=7)
        return self._linear((up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate), tensors, number, "proj")

    def _linear(self, x: Any, tensors: Rank, number: int, name: str) -> Any:
        linear = f"{self._prefix}.{name}"
        product = rounded(x, tensors, linear, self._fmt) @ dequantized(tensors, linear, self._fmt).T
        return product + tensors[f"{linear}.bias"][number].float() if f"{linear}.bias" in tensors else product


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_graph_of_calibrated_fused_experts_computes_what_transformers_does_with_rounded_ones(
    source: tuple[str, Path], algorithm: str, store: Path, tmp_path: Path
) -> None:
    family, folder = source
    spec = spec_of(folder, algorithm, {"tp": 2, "moe_ep": 2}, exclude=["*.attention.*", "*.shared_expert.*"])
    checkpoint = convert_here(spec, store, tmp_path / "ranks")
    network = BuildOptions.model_validate(next(preparation.plan(spec).of_kind(Kind.BUILD)).options).network
    calls = make_calls(TOKENS, LENGTHS, DECODE_STEPS, [1])
    results = Lockstep(network, [map_checkpoint_rank(checkpoint, rank) for rank in range(2)], calls, []).run()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ranks = [load_file(checkpoint / f"rank{rank}.safetensors") for rank in range(2)]
    for number, layer in enumerate(model.model.layers):
        fmt = network.stage.quantization.format_of(f"transformer.layers.{number}.mlp.fc")
        parent = next(module for module in layer.modules() if hasattr(module, "experts"))
        parent.experts = RoundedExperts(family, ranks, f"transformer.layers.{number}.mlp", fmt)
    with torch.inference_mode():
        expected = model(torch.from_numpy(TOKENS)).logits
    errors = relative_errors(results, expected)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.05


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_build_of_calibrated_fused_experts_is_verified_and_compiled(source: tuple[str, Path], algorithm: str, store: Path) -> None:
    """As on real text by the divergence; the logits of a random model lie too close to each other for the top-1 agreement."""
    spec = spec_of(source[1], algorithm)
    tolerance = QUANTIZERS[algorithm].tolerance.model_copy(update={"min_top1_agreement": 0.0})
    spec = spec.model_copy(update={"verification": spec.verification.model_copy(update={"tolerance": tolerance})})
    outcomes = run_here(preparation.plan(spec), store, Kind)
    assert outcomes["verify/stage0"].facts.verification.mean_kl > 1e-3  # it is quantized
    errors = {name: error for key in outcomes for name, error in getattr(outcomes[key].facts, "quantization_errors", {}).items()}
    assert {f"transformer.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("fc", "proj")} <= errors.keys()
    assert outcomes["build/rank0"].outputs


def test_gpt_oss_in_mxfp4_is_calibrated_as_the_dense_model_of_its_values(tmp_path: Path) -> None:
    plain = write_tiny("gpt_oss", tmp_path / "plain", intermediate_size=64, **SIZES["gpt_oss"])
    quantized, dense = write_gpt_oss_in_mxfp4(plain, tmp_path)
    found, expected = (calibrated(preparation.plan(spec_of(folder, "FP8")), tmp_path / "store") for folder in (quantized, dense))
    assert_same(found, expected)
    for folder in (quantized, dense):
        convert_here(spec_of(folder, "FP8"), tmp_path / "store", tmp_path / f"{folder.name}-ranks")
    ours, theirs = (tmp_path / f"{kind}-ranks" / "rank0.safetensors" for kind in ("quantized", "dense"))
    assert ours.read_bytes() == theirs.read_bytes()
