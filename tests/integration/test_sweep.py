from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import quantizing
from orchestrator.base.errors import QuantizationError, StoreError
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from tests.support import modelopt
from tests.support.here import HereCluster, run_here


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modelopt.write_model(tmp_path_factory.mktemp("sweep") / "source")


def spec(source: Path, **quantization: Any) -> BuildSpec:
    fields = {
        "source": {"path": str(source)},
        "dtype": "bfloat16",
        "engine": {"max_input_len": 16, "max_seq_len": 32},
        "verification": {"max_tokens": 8, "decode_steps": 2},
        "release": {"name": "tiny", "version": "1"},
    }
    calibration = {"num_samples": 4, "max_length": 16, "batch_size": 4}
    return decode(BuildSpec, {**fields, "quantization": {"calibration": calibration, **quantization}}, "spec")


def at(folder: Path) -> ClusterSpec:
    return ClusterSpec(store=folder.resolve().as_uri())


def test_sweep_algorithms_that_need_only_amax_calibrate_once_and_the_reference_is_computed_once(
    source: Path, tmp_path: Path
) -> None:
    algorithms = ["none", "FP8", "W4A16_NVFP4"]
    rows = quantizing.sweep(spec(source, algorithm="FP8"), algorithms, at(tmp_path), open_cluster=lambda place: HereCluster())
    assert [row.algorithm for row in rows] == algorithms
    # reference, convert, verify; calibrate, convert, verify; convert, verify
    assert [row.num_steps_run for row in rows] == [3, 3, 2]
    none, fp8, nvfp4 = rows
    assert none.verification.mean_kl < 1e-6 < fp8.verification.mean_kl < nvfp4.verification.mean_kl
    assert none.verification.perplexity_ratio == pytest.approx(1.0, abs=1e-3)
    assert none.checkpoint_bytes > fp8.checkpoint_bytes > nvfp4.checkpoint_bytes
    assert none.worst_linear == ""
    assert 0.08 < nvfp4.worst_error < 0.12


def test_sweep_of_an_algorithm_that_does_not_exist_is_refused_before_any_step(source: Path, tmp_path: Path) -> None:
    def no_cluster(place: ClusterSpec) -> HereCluster:
        raise AssertionError("a step was run")

    with pytest.raises(QuantizationError, match="FP9"):
        quantizing.sweep(spec(source, algorithm="FP8"), ["W8A16", "FP9"], at(tmp_path), open_cluster=no_cluster)


def test_calibrate_artifact_given_to_another_build_spares_its_calibration(source: Path, tmp_path: Path) -> None:
    wanted = spec(source, algorithm="W4A16_AWQ")
    artifact = tmp_path / "artifact"
    files = quantizing.calibrate(wanted, artifact, at(tmp_path / "store"), open_cluster=lambda place: HereCluster())
    assert [path.name for path in files] == ["scales.safetensors", "calibrate-awq_lite-part0.recipe.json"]
    own = run_here(preparation.plan(wanted), tmp_path / "own", (Kind.CALIBRATE, Kind.CONVERT))
    given = preparation.plan(spec(source, algorithm="W4A16_AWQ", scales=str(artifact)))
    assert not list(given.of_kind(Kind.CALIBRATE))
    brought = run_here(given, tmp_path / "given", (Kind.CONVERT,))
    digests = [run["convert/stage0/group0"].output("rank0.safetensors").sha256 for run in (own, brought)]
    assert digests[0] == digests[1]
    with pytest.raises(StoreError, match="already holds"):
        quantizing.calibrate(wanted, artifact, at(tmp_path / "store"))


def test_calibrate_data_free_algorithm_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="calibrates nothing"):
        quantizing.calibrate(spec(source, algorithm="W8A16"), tmp_path / "artifact", at(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_choose_spends_a_larger_budget_and_its_mixture_is_built_from(source: Path, tmp_path: Path) -> None:
    chosen = {}
    for bits in (5.0, 9.0):
        path = tmp_path / f"{bits}.json"
        chosen[bits] = quantizing.choose(spec(source, algorithm="FP8"), ["FP8", "W4A16_AWQ"], bits, path)
    num_int4 = {
        bits: sum(fmt is not None and fmt.algorithm == "W4A16_AWQ" for fmt in found.values()) for bits, found in chosen.items()
    }
    assert num_int4[5.0] > num_int4[9.0]
    listed = json.loads((tmp_path / "5.0.json").read_text())["quantized_layers"]
    assert listed == {name: entry for name, entry in listed.items() if chosen[5.0][name] is not None}
    mixed = preparation.plan(spec(source, algorithm="MIXED_PRECISION", quant_cfg=str(tmp_path / "5.0.json")))
    outcomes = run_here(mixed, tmp_path / "store", (Kind.CALIBRATE, Kind.CONVERT))
    assert set(outcomes["convert/stage0/group0"].facts.quantization_errors) == set(listed)


@pytest.mark.parametrize("bits", [6.0, 8.0000001])
def test_choose_within_a_budget_that_no_mixture_meets_is_refused(source: Path, tmp_path: Path, bits: float) -> None:
    with pytest.raises(QuantizationError, match="no mixture of these formats meets the budget: "):
        quantizing.choose(spec(source, algorithm="FP8"), ["FP8"], bits, tmp_path / "quant_cfg.json")
    assert not (tmp_path / "quant_cfg.json").exists()


def test_choose_format_that_this_machine_cannot_execute_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="NVFP4 needs a GPU"):
        quantizing.choose(spec(source, algorithm="FP8"), ["NVFP4"], 4.5, tmp_path / "quant_cfg.json")
    assert not (tmp_path / "quant_cfg.json").exists()
