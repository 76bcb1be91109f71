"""convert and build-engine on their own, and the in-process API: three ways to the same bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from orchestrator import stages
from orchestrator.base.errors import ArchitectureError, TopologyError, VerificationError, WeightMapError
from orchestrator.cli.commands import app
from orchestrator.compat.models import BuildConfig, LLaMAForCausalLM, Mapping, MistralForCausalLM, build
from tests.support.synthetic import build_spec

CONFIG = BuildConfig(max_batch_size=2, max_input_len=16, max_seq_len=64)


def convert(source: Path, output: Path, *words: str) -> None:
    result = CliRunner().invoke(app, ["convert", "--source", str(source), "--output", str(output), *words])
    assert result.exit_code == 0, result.output


def names_in(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a mapping


def test_convert_and_save_checkpoint_write_the_same_files(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "cli", "--tp", "2", "--pp", "2")
    for rank in range(4):
        model = LLaMAForCausalLM.from_hugging_face(tiny_llama, mapping=Mapping(2, 2, rank))
        model.save_checkpoint(tmp_path / "api", save_config=rank == 0)
    names = sorted(path.name for path in (tmp_path / "cli").iterdir())
    assert names == ["config.json", *(f"rank{rank}.safetensors" for rank in range(4))]
    for name in names:
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "api" / name).read_bytes()


def test_convert_of_ranks_over_the_limit_writes_shards_and_an_index(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "whole")
    convert(tiny_llama, tmp_path / "split", "--max-shard-bytes", "70KB")
    index = json.loads((tmp_path / "split" / "rank0.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"rank0-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 1
    whole = LLaMAForCausalLM.from_checkpoint(tmp_path / "whole").weights()
    split = LLaMAForCausalLM.from_checkpoint(tmp_path / "split").weights()
    assert all(bytes(whole[name].data) == bytes(split[name].data) for name in whole)


def test_convert_with_verify_writes_the_same_files_and_prints_their_error(tiny_llama: Path, tmp_path: Path) -> None:
    split = ("--tp", "2", "--pp", "2", "--split-embedding", "0")
    convert(tiny_llama, tmp_path / "plain", *split)
    words = ["convert", "--source", str(tiny_llama), "--output", str(tmp_path / "verified"), *split, "--verify"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert re.search(r"verified on \d+ positions: .* max relative error \d\.\d\de-0[678]", result.output)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "verified").iterdir())
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "verified" / name).read_bytes() for name in names)


def test_convert_with_verify_beyond_the_tolerance_writes_no_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    spec = build_spec(tiny_llama, topology={"tp": 2}, verification={"tolerance": {"max_relative_error": 1e-12}})
    with pytest.raises(VerificationError, match=r"^verify/stage0: .* relative error .* > 1e-12"):
        stages.convert(spec, tmp_path / "output", verify=True)
    assert [path.name for path in (tmp_path / "output").iterdir()] == [".staging"]


def test_convert_over_an_existing_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path)
    result = CliRunner().invoke(app, ["convert", "--source", str(tiny_llama), "--output", str(tmp_path)])
    assert result.exit_code != 0
    assert "already holds a checkpoint" in result.output


def test_build_engine_of_one_rank_writes_only_it(tiny_llama: Path, tmp_path: Path) -> None:
    convert(tiny_llama, tmp_path / "checkpoint", "--tp", "2")
    result = CliRunner().invoke(
        app,
        ["build-engine", "--checkpoint", str(tmp_path / "checkpoint"), "--rank", "1", "--output", str(tmp_path / "engines"),
         "--max-batch-size", "2", "--max-input-len", "16", "--max-seq-len", "64"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == ["config.json", "rank1.engine"]


def test_from_hugging_face_writes_nothing_and_reads_lazily(tiny_llama: Path) -> None:
    before = sorted(path.name for path in tiny_llama.iterdir())
    model = LLaMAForCausalLM.from_hugging_face(tiny_llama, dtype="float16", mapping=Mapping(tp_size=2, rank=1))
    assert sorted(path.name for path in tiny_llama.iterdir()) == before
    assert model.config.dtype == "float16"
    qkv = model.weights()["transformer.layers.0.attention.qkv.weight"]
    assert (qkv.dtype, qkv.shape) == ("F16", ((2 + 2 * 1) * 16, 64))


def test_from_hugging_face_of_another_architecture_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ArchitectureError, match="LlamaForCausalLM"):
        MistralForCausalLM.from_hugging_face(tiny_llama)


def test_from_hugging_face_at_an_illegal_mapping_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(TopologyError):
        LLaMAForCausalLM.from_hugging_face(tiny_llama, mapping=Mapping(tp_size=3))


def test_load_of_a_dictionary_builds_the_same_weights(tiny_llama: Path) -> None:
    import torch

    source = LLaMAForCausalLM.from_hugging_face(tiny_llama)
    given = {}
    for number, (name, weight) in enumerate(source.weights().items()):
        array = np.array(weight.data).view(ml_dtypes.bfloat16).reshape(weight.shape)
        given[name] = array if number % 2 else torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    model = LLaMAForCausalLM(source.config, Mapping())
    model.load(given)
    assert all(bytes(model.weights()[name].data) == bytes(weight.data) for name, weight in source.weights().items())


def test_load_of_an_incomplete_dictionary_names_what_lacks(tiny_llama: Path) -> None:
    source = LLaMAForCausalLM.from_hugging_face(tiny_llama)
    given = dict(source.weights())
    del given["transformer.ln_f.weight"]
    with pytest.raises(WeightMapError, match=r"Required but not provided tensors: transformer\.ln_f\.weight"):
        LLaMAForCausalLM(source.config, Mapping()).load(given)


def test_load_of_another_shape_or_dtype_is_refused(tiny_llama: Path) -> None:
    source = LLaMAForCausalLM.from_hugging_face(tiny_llama)
    model = LLaMAForCausalLM(source.config, Mapping())
    with pytest.raises(WeightMapError, match="this rank needs"):
        model.load({**source.weights(), "transformer.ln_f.weight": np.ones(7, ml_dtypes.bfloat16)})
    with pytest.raises(WeightMapError, match="is F32, this rank needs BF16"):
        model.load({**source.weights(), "transformer.ln_f.weight": np.ones(64, np.float32)})


def test_build_of_a_loaded_checkpoint_saves_an_engine(tiny_llama: Path, tmp_path: Path) -> None:
    LLaMAForCausalLM.from_hugging_face(tiny_llama).save_checkpoint(tmp_path / "checkpoint")
    engine = build(LLaMAForCausalLM.from_checkpoint(tmp_path / "checkpoint"), CONFIG)
    engine.save(tmp_path / "engine")
    assert (tmp_path / "engine" / "rank0.engine").read_bytes() == engine.plan
    assert json.loads((tmp_path / "engine" / "config.json").read_text())["build_config"]["max_seq_len"] == 64
    assert [tensor.name for tensor in engine.record.tensors][:2] == ["input_ids", "position_ids"]


def test_saved_checkpoint_has_tensorrt_llm_names_and_shapes(tiny_llama: Path, tmp_path: Path) -> None:
    LLaMAForCausalLM.from_hugging_face(tiny_llama, mapping=Mapping(2, 2, 3)).save_checkpoint(tmp_path)
    found = names_in(tmp_path / "rank3.safetensors")
    assert found["transformer.layers.1.attention.qkv.weight"] == [64, 64]
    assert found["transformer.layers.0.mlp.proj.weight"] == [64, 48]
    assert found["lm_head.weight"] == [66, 64]
    assert "transformer.vocab_embedding.weight" not in found
    assert "transformer.layers.2.input_layernorm.weight" not in found
