"""`PretrainedModel.quantize`: the bytes of the convert steps, and Model Optimizer on one rank of an MPI program only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base.errors import QuantizationError, SourceMissingError
from orchestrator.compat.models import BuildConfig, DecoderModelForCausalLM, LLaMAForCausalLM, Mapping, QuantizationSpec, build
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from orchestrator.work.shards import map_checkpoint_rank
from tests.integration.quantize_under_mpi import CALIBRATION, SPEC
from tests.support.families import write_tiny
from tests.support.here import convert_here
from tests.support.mpi import find_mpiexec, rank_environment


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("in-process-store")


def converted(source: Path, store: Path, output: Path, quantization: QuantizationSpec, **topology: int) -> Path:
    plain = {
        "source": {"path": str(source)}, "dtype": "bfloat16", "topology": topology, "quantization": quantization.model_dump(),
        "engine": {"max_input_len": 16, "max_seq_len": 32}, "release": {"name": "tiny", "version": "1"},
    }  # fmt: skip
    return convert_here(decode(BuildSpec, plain, "spec"), store, output)


def asked(algorithm: str, **options: Any) -> QuantizationSpec:
    return QuantizationSpec.model_validate({"algorithm": algorithm, "calibration": CALIBRATION, **options})


def test_quantize_in_an_mpi_program_runs_modelopt_on_rank_zero_only(tiny_llama: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranks"
    output.mkdir()
    command = [
        find_mpiexec(),
        "-n",
        "4",
        sys.executable,
        "-m",
        "tests.integration.quantize_under_mpi",
        str(tiny_llama),
        str(output),
    ]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=rank_environment(), timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in output.glob("modelopt-*")] == ["modelopt-of-rank0"]
    expected = converted(tiny_llama, store, tmp_path / "converted", SPEC, tp=2, pp=2)
    for rank in range(4):
        name = f"rank{rank}.safetensors"
        assert (output / name).read_bytes() == (expected / name).read_bytes()
        assert "different quantizations" in (output / f"different{rank}").read_text()
        assert "NONE" in (output / f"unknown{rank}").read_text()
        where = "" if rank == 0 else "rank 0: "
        assert (output / f"failing{rank}").read_text().startswith(f"ToolError: {where}nothing works here")


@pytest.mark.parametrize("quantization", [asked("W4A8_AWQ", group_size=16), asked("W8A16")], ids=lambda spec: str(spec.algorithm))
def test_quantize_of_one_rank_gives_what_conversion_writes(
    quantization: QuantizationSpec, tiny_llama: Path, store: Path, tmp_path: Path
) -> None:
    expected = converted(tiny_llama, store, tmp_path / "converted", quantization, tp=2)
    model = LLaMAForCausalLM.from_hugging_face(tiny_llama, mapping=Mapping(tp_size=2, rank=1))
    model.quantize(quantization)
    model.save_checkpoint(tmp_path / "saved")
    assert (tmp_path / "saved" / "rank1.safetensors").read_bytes() == (expected / "rank1.safetensors").read_bytes()


def test_quantize_of_experts_gives_each_rank_the_scales_of_its_own(store: Path, tmp_path: Path) -> None:
    source = write_tiny("mixtral", tmp_path / "mixtral", num_hidden_layers=1)
    expected = converted(source, store, tmp_path / "converted", asked("NVFP4"), tp=2, moe_ep=2)
    for rank in range(2):
        model = DecoderModelForCausalLM.from_hugging_face(source, mapping=Mapping(tp_size=2, moe_ep_size=2, rank=rank))
        model.quantize(asked("NVFP4"))
        mine, theirs = model.weights(), map_checkpoint_rank(expected, rank)
        assert mine.keys() == theirs.keys()
        assert not [name for name in mine if mine[name].data.tobytes() != theirs[name].data.tobytes()]


def test_quantized_model_is_saved_loaded_and_built(tiny_llama: Path, tmp_path: Path) -> None:
    model = LLaMAForCausalLM.from_hugging_face(tiny_llama, dtype="float16")
    model.quantize(asked("W8A16"))
    model.save_checkpoint(tmp_path)
    loaded = LLaMAForCausalLM.from_checkpoint(tmp_path)
    assert loaded.quantization == model.quantization
    engine = build(loaded, BuildConfig(max_batch_size=1, max_input_len=16, max_seq_len=32))
    assert engine.config["pretrained_config"]["quantization"]["quant_algo"] == "W8A16"
    unquantized = sum(weight.data.nbytes for weight in LLaMAForCausalLM.from_hugging_face(tiny_llama).weights().values())
    assert sum(weight.data.nbytes for weight in loaded.weights().values()) < unquantized


def test_quantized_model_of_mixed_formats_is_saved_with_the_list_of_them(tiny_llama: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.json"
    layers = {"transformer.layers.0.mlp.fc": {"quant_algo": "W8A16"}, "transformer.layers.3.mlp.proj": {"quant_algo": "MXFP8"}}
    wanted.write_text(json.dumps({"quantized_layers": layers}))
    model = LLaMAForCausalLM.from_hugging_face(tiny_llama)
    model.quantize(asked("MIXED_PRECISION", quant_cfg=str(wanted)))
    model.save_checkpoint(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "quant_cfg.json").read_text())["quantized_layers"].keys() == layers.keys()
    loaded = LLaMAForCausalLM.from_checkpoint(tmp_path / "saved")
    assert loaded.stage.format_of("transformer.layers.0.mlp.fc") == model.stage.format_of("transformer.layers.0.mlp.fc") is not None
    assert loaded.stage.format_of("transformer.layers.1.mlp.fc") is None


def test_quantize_of_a_model_without_a_source_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    LLaMAForCausalLM.from_hugging_face(tiny_llama).save_checkpoint(tmp_path)
    with pytest.raises(SourceMissingError, match="no source"):
        LLaMAForCausalLM.from_checkpoint(tmp_path).quantize(asked("FP8"))


def test_quantize_by_an_unknown_algorithm_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(QuantizationError, match="INT3"):
        LLaMAForCausalLM.from_hugging_face(tiny_llama).quantize(asked("INT3"))
