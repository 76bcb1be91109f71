"""Our calibrate and convert steps against Model Optimizer's own calibration and TensorRT-LLM export of the whole model."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.base.errors import QuantizationError, ToolError
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind
from orchestrator.quantizers import modelopt as quantizer
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from orchestrator.work.calibrate import part_model
from tests.support import modelopt
from tests.support.families import write_tiny
from tests.support.here import convert_here, run_here, scales_of
from tests.support.quantized import dense

TOPOLOGIES = [(1, 1), (3, 1), (1, 2), (3, 2)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modelopt.write_model(tmp_path_factory.mktemp("modelopt") / "source")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: calibrations of one kind are done once."""
    return tmp_path_factory.mktemp("modelopt-store")


def spec(source: Path, tp: int, pp: int, **quantization: Any) -> BuildSpec:
    calibration = {"num_samples": modelopt.NUM_SAMPLES, "max_length": modelopt.MAX_LENGTH, "batch_size": 4}
    return decode(
        BuildSpec,
        {
            "source": {"path": str(source)},
            "dtype": "bfloat16",
            "topology": {"tp": tp, "pp": pp},
            # Model Optimizer always splits the embedding by vocabulary.
            "conversion": {"use_parallel_embedding": True},
            "quantization": {**quantization, "calibration": {**calibration, **quantization.get("calibration", {})}},
            "engine": {"max_input_len": 16, "max_seq_len": 32},
            "release": {"name": "tiny", "version": "1"},
        },
        "spec",
    )


@functools.cache
def oracle(source: Path, algorithm: str, kv_cache: str | None) -> Any:
    return modelopt.calibrated(source, algorithm, kv_cache)


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_rank_files(ours: Path, theirs: Path, num_ranks: int, *, unlike: tuple[str, ...] = ()) -> None:
    for rank in range(num_ranks):
        mine, expected = (load_file(folder / f"rank{rank}.safetensors") for folder in (ours, theirs))
        assert mine.keys() == expected.keys()
        different = [name for name in mine if raw(mine[name]) != raw(expected[name]) and not name.endswith(unlike)]
        assert not different, f"rank {rank}: {different[:5]}"


@pytest.mark.parametrize("algorithm", modelopt.PRESETS)
def test_quantized_rank_files_are_those_of_modelopts_exporter(algorithm: str, source: Path, store: Path, tmp_path: Path) -> None:
    model = oracle(source, algorithm, None)
    for tp, pp in TOPOLOGIES:
        theirs = modelopt.export(model, tmp_path / f"theirs{tp}{pp}", tp, pp)
        ours = convert_here(spec(source, tp, pp, algorithm=algorithm), store, tmp_path / f"ours{tp}{pp}")
        same_rank_files(ours, theirs, tp * pp)


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_rank_files_from_modelopts_published_folder_are_those_of_its_exporter(
    algorithm: str, source: Path, store: Path, tmp_path: Path
) -> None:
    """Two ways of Model Optimizer from one calibration meet: its unified folder, cut by us, and its own rank files.

    Not those of FP8 and W4A16_NVFP4, whose joined linears the two ways scale differently.
    """
    model = oracle(source, algorithm, None)
    published = modelopt.export_unified(model, tmp_path / "published")
    for tp, pp in TOPOLOGIES:
        theirs = modelopt.export(model, tmp_path / f"theirs{tp}{pp}", tp, pp)
        plan = spec(published, tp, pp, algorithm="source")
        assert not list(preparation.plan(plan).of_kind(Kind.CALIBRATE))
        same_rank_files(convert_here(plan, store, tmp_path / f"ours{tp}{pp}"), theirs, tp * pp)


@pytest.mark.parametrize(("algorithm", "error"), [("W4A16_AWQ", 0.15), ("W8A8_SQ_PER_CHANNEL", 0.012)])
def test_dequantized_weights_of_modelopts_published_folder_are_the_originals_within_their_rounding(
    algorithm: str, error: float, source: Path, tmp_path: Path
) -> None:
    """The factors of the input (pre_quant_scale) that the folder holds beside a weight are in it; others are in its norms."""
    published = modelopt.export_unified(oracle(source, algorithm, None), tmp_path / "published")
    plain, found = load_file(source / "model.safetensors"), dense(published, dtype="F32")
    factors = load_file(published / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    assert relative(found[f"{name}.weight"], plain[f"{name}.weight"]) < error
    without = found[f"{name}.weight"] / factors[f"{name}.pre_quant_scale"].float()
    assert relative(without, plain[f"{name}.weight"]) > 1.5 * error
    norm, linear = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    assert relative(found[linear] * found[norm].float(), plain[linear].float() * plain[norm].float()) < error


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_int8_kv_cache_scales_are_those_of_modelopts_exporter(source: Path, store: Path, tmp_path: Path) -> None:
    theirs = modelopt.export(oracle(source, "FP8", "INT8"), tmp_path / "theirs", 3, 2)
    convert_here(spec(source, 3, 2, algorithm="FP8", kv_cache="INT8"), store, tmp_path / "ours")
    same_rank_files(tmp_path / "ours", theirs, 6)


def test_fp8_kv_cache_scales_are_those_of_modelopt_without_its_clamp(source: Path, store: Path, tmp_path: Path) -> None:
    """Its exporter raises FP8 scales of the cache to 1.0, which throws away range; everything else is the same."""
    model = oracle(source, "FP8", "FP8")
    theirs = modelopt.export(model, tmp_path / "theirs", 1, 1)
    convert_here(spec(source, 1, 1, algorithm="FP8", kv_cache="FP8"), store, tmp_path / "ours")
    same_rank_files(tmp_path / "ours", theirs, 1, unlike=("cache_scaling_factor",))
    written = load_file(tmp_path / "ours" / "rank0.safetensors")
    for number, layer in enumerate(model.model.layers):
        scales = [quantizer.amax.float() / 448 for quantizer in (layer.self_attn.k_bmm_quantizer, layer.self_attn.v_bmm_quantizer)]
        expected = dict(zip(("k", "v", "kv"), [*scales, max(scales)], strict=True))
        for name, scale in expected.items():
            found = written[f"transformer.layers.{number}.attention.{name}_cache_scaling_factor"]
            assert found.tolist() == [scale.item()]


def test_rank_files_of_heads_held_twice_are_those_of_modelopts_exporter(source: Path, store: Path, tmp_path: Path) -> None:
    theirs = modelopt.export(oracle(source, "NVFP4", None), tmp_path / "theirs", 6, 1)
    convert_here(spec(source, 6, 1, algorithm="NVFP4"), store, tmp_path / "ours")
    same_rank_files(tmp_path / "ours", theirs, 6)


@pytest.mark.parametrize("algorithm", ["FP8", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ"])
def test_calibration_part_by_part_gives_the_scales_of_the_whole(algorithm: str, source: Path, store: Path) -> None:
    whole, parts = (
        run_here(
            preparation.plan(spec(source, 1, 1, algorithm=algorithm, calibration={"num_stages": count})), store, [Kind.CALIBRATE]
        )
        for count in (1, 2)
    )
    (one,) = whole.values()
    expected = scales_of(one, store)
    found = [scales_of(part, store) for part in parts.values()]
    assert len(found) == 2
    assert found[0].keys().isdisjoint(found[1])
    together = found[0] | found[1]
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)


DENSE_AMONG_EXPERTS = ["glm4_moe", "ernie4_5_moe", "minimax_m2"]
FUSED = ["gemma4", "granitemoeshared", "mistral4"]
"""Families whose experts lie in tensors of all experts; more of them in test_fused_calibration.py."""


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "mixtral", "phimoe", "qwen3_moe", *DENSE_AMONG_EXPERTS, *FUSED])
def test_calibration_of_a_family_part_by_part_gives_the_scales_of_the_whole(family: str, store: Path, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / family)
    whole, parts = (
        run_here(preparation.plan(spec(folder, 1, 1, algorithm="FP8", calibration={"num_stages": count})), store, [Kind.CALIBRATE])
        for count in (1, 2)
    )
    (one,) = whole.values()
    expected = scales_of(one, store)
    together = {name: value for part in parts.values() for name, value in scales_of(part, store).items()}
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)
    assert all(float(value) > 0 for value in expected.values())


def test_calibration_of_dense_layers_between_experts_part_by_part_gives_the_scales_of_the_whole(
    store: Path, tmp_path: Path
) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "model", num_hidden_layers=5, mlp_only_layers=[1, 3])
    whole, parts = (
        run_here(preparation.plan(spec(folder, 1, 1, algorithm="FP8", calibration={"num_stages": count})), store, [Kind.CALIBRATE])
        for count in (1, 3)
    )
    (one,) = whole.values()
    expected = scales_of(one, store)
    together = {name: value for part in parts.values() for name, value in scales_of(part, store).items()}
    assert together.keys() == expected.keys()
    assert any("layers.3.mlp.gate_proj" in name for name in expected)
    assert all(torch.equal(together[name], expected[name]) for name in expected)


def test_calibration_awq_of_experts_scales_each_and_they_agree_on_one_vector(store: Path, tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "mixtral", hidden_size=64, intermediate_size=64)
    made = preparation.plan(spec(folder, 1, 1, algorithm="W4A16_AWQ", group_size=32))
    (one,) = run_here(made, store, [Kind.CALIBRATE]).values()
    scales = scales_of(one, store)
    prefix = "model.layers.1.block_sparse_moe.experts."
    agreed = [
        value
        for name, value in scales.items()
        if name.startswith(prefix) and name.endswith(("w1.pre_quant_scale", "w3.pre_quant_scale"))
    ]
    assert len(agreed) == 8
    assert all(torch.equal(value, agreed[0]) for value in agreed)


def test_calibration_experts_that_see_no_token_take_the_largest_of_their_peers(store: Path, tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "mixtral", num_local_experts=16)
    made = preparation.plan(spec(folder, 1, 1, algorithm="FP8", calibration={"num_samples": 1, "max_length": 4}))
    (one,) = run_here(made, store, [Kind.CALIBRATE]).values()
    unseen = one.facts.unseen
    assert len(unseen) >= 3 * 3 * 8  # four tokens reach at most eight of sixteen experts in each of three layers
    scales = scales_of(one, store)
    layer = unseen[0].partition(".block_sparse_moe")[0] + "."
    kind = unseen[0].rpartition(".")[2]
    peers = {name: value for name, value in scales.items() if name.startswith(layer) and name.endswith(f"{kind}.input_amax")}
    assert scales[unseen[0] + ".input_amax"] == max(peers.values())


def test_calibration_reports_what_it_read_and_the_range_of_its_inputs(source: Path, store: Path) -> None:
    (one,) = run_here(preparation.plan(spec(source, 1, 1, algorithm="FP8")), store, [Kind.CALIBRATE]).values()
    facts, scales = one.facts, scales_of(one, store)
    assert (facts.num_samples, facts.num_tokens) == (modelopt.NUM_SAMPLES, modelopt.NUM_SAMPLES * modelopt.MAX_LENGTH)
    assert facts.unseen == ()
    values = sorted(float(value) for name, value in scales.items() if name.endswith("down_proj.input_amax"))
    assert facts.input_amax["down_proj"] == (values[0], sum(values) / 2, values[-1])  # of two layers
    assert len(facts.input_amax) == 7
    recipe = json.loads(open_store(store.as_uri()).get(one.output("recipe.json").key))
    assert recipe["method"] == {"method": "max"}
    assert set(recipe["tools"]) == {"nvidia-modelopt", "torch", "transformers"}


def test_calibration_of_a_source_without_a_weight_of_the_model_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of = part_model.layer_tensors

    def but_one(*layers: Any) -> dict[str, Any]:
        return {name: tensor for name, tensor in all_of(*layers).items() if "1.mlp.up_proj" not in name}

    monkeypatch.setattr(part_model, "layer_tensors", but_one)
    with pytest.raises(QuantizationError, match=r"1 weights .* model.layers.1.mlp.up_proj.weight"):
        run_here(preparation.plan(spec(source, 1, 1, algorithm="FP8")), tmp_path, [Kind.CALIBRATE])


def test_calibration_by_a_model_optimizer_that_smooths_elsewhere_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded function is no public one: a version that renames or bypasses it must not give wrong scales."""
    from modelopt.torch.quantization import model_calib

    apply = model_calib._apply_weight_pre_quant_scale
    recorded = quantizer._recorded_smoothing

    @contextlib.contextmanager
    def bypassed(*args: Any) -> Iterator[Any]:
        with recorded(*args) as found:
            model_calib._apply_weight_pre_quant_scale = apply
            yield found

    monkeypatch.setattr(quantizer, "_recorded_smoothing", bypassed)
    with pytest.raises(QuantizationError, match=r"smoothed .* unnoticed"):
        run_here(preparation.plan(spec(source, 1, 1, algorithm="W8A8_SQ_PER_CHANNEL")), tmp_path, [Kind.CALIBRATE])


def test_calibration_on_a_gpu_that_is_not_there_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    wanted = spec(source, 1, 1, algorithm="FP8", calibration={"device": "cuda"})
    with pytest.raises(ToolError, match="sees no GPU"):
        run_here(preparation.plan(wanted), tmp_path, [Kind.CALIBRATE])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_calibration_of_a_family_part_by_part_finds_what_modelopt_finds_in_the_whole(
    family: str, store: Path, tmp_path: Path
) -> None:
    folder = write_tiny(family, tmp_path / family)
    expected = {
        f"{path}.{quantity}": quantizer.amax.float().item()
        for path, module in modelopt.calibrated(folder, "FP8", "FP8").named_modules()
        for name, quantity in (("input", "input_amax"), ("weight", "weight_amax"), ("k_bmm", "k_amax"), ("v_bmm", "v_amax"))
        if (quantizer := getattr(module, f"{name}_quantizer", None)) is not None and quantizer.is_enabled
    }
    parts = run_here(preparation.plan(spec(folder, 1, 1, algorithm="FP8", calibration={"num_stages": 2})), store, [Kind.CALIBRATE])
    found = {name: value.item() for part in parts.values() for name, value in scales_of(part, store).items()}
    assert found == expected
