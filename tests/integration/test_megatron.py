"""Checkpoints that megatron-core wrote, converted and verified: the same rank files as from the Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.base.errors import SourceMissingError
from orchestrator.cli.inspection import inspect
from orchestrator.compat.models import DecoderModelForCausalLM
from orchestrator.compat.models import Mapping as Place
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind
from orchestrator.releases import genai
from orchestrator.releases.placing import place as place_engines
from orchestrator.releases.publish import publish
from orchestrator.stores import open_store
from tests.integration.steps import run_steps
from tests.integration.test_formats import converted, scales
from tests.integration.test_formats import upload as upload
from tests.support.megatron_fixtures import NAMES, unpack, write_model
from tests.support.releases import pretend_to_run, release_spec
from tests.support.synthetic import build_spec

TOPOLOGIES: tuple[dict[str, Any], ...] = ({}, {"tp": 4})


@pytest.mark.parametrize("name", NAMES)
def test_convert_of_a_megatron_checkpoint_equals_that_of_hugging_face(tmp_path: Path, name: str) -> None:
    source = write_model(name.partition("-")[0], tmp_path / "source")
    folder = unpack(name, tmp_path / "megatron")
    for number, topology in enumerate(TOPOLOGIES):
        expected = converted(source, tmp_path / f"expected{number}", topology)
        assert converted(folder, tmp_path / f"found{number}", topology) == expected, topology


@pytest.mark.parametrize(
    "name", ["llama-tp2-pp2", "llama31", "qwen2-tp2-pp2", "qwen3-tp2-pp2", "qwen3_moe-ep2-per-layer", "mixtral-ep2"]
)
def test_verification_of_a_megatron_checkpoint_agrees_with_transformers(tmp_path: Path, name: str) -> None:
    folder = unpack(name, tmp_path / "megatron")
    made = preparation.plan(build_spec(folder, dtype="bfloat16", topology={"tp": 2}))
    kinds = (Kind.MINIATURE, Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY)
    outcomes = run_steps(made, (tmp_path / "built").as_uri(), kinds)
    assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3


def test_from_nemo_reads_ranks_of_nemo_and_bridge(tmp_path: Path) -> None:
    source, place = write_model("llama", tmp_path / "source"), Place(tp_size=2, rank=1)
    expected = DecoderModelForCausalLM.from_hugging_face(source, mapping=place).weights()
    for name in ("llama-nemo", "llama-tp2-pp2"):
        found = DecoderModelForCausalLM.from_nemo(unpack(name, tmp_path / name), mapping=place).weights()
        assert {key: bytes(weight.data) for key, weight in found.items()} == {
            key: bytes(weight.data) for key, weight in expected.items()
        }
    with pytest.raises(SourceMissingError, match=r"no \.metadata beside \.distcp files"):
        DecoderModelForCausalLM.from_nemo(source)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of characters, with fewer ids than the models have."""
    import tokenizers
    import transformers

    letters = {letter: number for number, letter in enumerate("<abcdefghijklmnopqrstuvwxyz.,' ")}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<", eos_token="<").save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "place", "is_asked"),
    [("llama", "tokenizer", False), ("llama-nemo", "context/nemo_tokenizer", False), ("qwen2", "elsewhere", True)],
)
def test_tokenizer_of_a_megatron_checkpoint_is_used_and_published(tmp_path: Path, name: str, place: str, is_asked: bool) -> None:
    folder = unpack(name, tmp_path / "source")
    save_tokenizer(folder / place)
    spec = release_spec(folder, verification={}, quantization={"algorithm": "FP8"})
    if is_asked:
        (folder / "tokenizer").mkdir()  # not this one
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        spec = spec.model_copy(update={"source": spec.source.model_copy(update={"tokenizer": str(folder / place)})})
    made = preparation.plan(spec)
    (reference,) = run_steps(made, (tmp_path / "built").as_uri(), (Kind.REFERENCE,)).values()
    assert reference.facts.text == "text"
    store = open_store((tmp_path / "store").as_uri())
    outcomes = pretend_to_run(made, store)
    shared = {file.path: file for file in publish(store, made, outcomes, place_engines(store, made, outcomes)).shared}
    assert {path for path in shared if path.startswith("tokenizer/")} == {
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    expected = (folder / place / "tokenizer.json").read_bytes()
    assert shared["tokenizer/tokenizer.json"].sha256 == hashlib.sha256(expected).hexdigest()


def test_tokenizer_that_is_asked_for_and_is_none_is_refused(tmp_path: Path) -> None:
    spec = build_spec(unpack("llama", tmp_path / "source"), dtype="bfloat16")
    spec = spec.model_copy(update={"source": spec.source.model_copy(update={"tokenizer": str(tmp_path / "source")})})
    with pytest.raises(SourceMissingError, match="holds no tokenizer"):
        preparation.plan(spec)


def test_megatron_in_object_storage_is_converted_and_calibrated_as_on_a_disk(tmp_path: Path, upload: Callable[[Path], str]) -> None:
    source = write_model("qwen3", tmp_path / "source")
    remote = upload(unpack("qwen3-tp2-pp2", tmp_path / "megatron"))
    expected = converted(source, tmp_path / "expected", {"tp": 4})
    assert converted(remote, tmp_path / "found", {"tp": 4}) == expected
    assert scales(remote, tmp_path / "remote") == scales(str(source), tmp_path / "local")


def test_special_tokens_of_a_run_reach_the_portable_part(tmp_path: Path) -> None:
    folder = unpack("llama", tmp_path / "bridge")
    config = folder / "run_config.yaml"
    document = yaml.safe_load(config.read_text())
    document["model"]["generation_config"] = {"_call_": True, "config_dict": {"bos_token_id": 11, "eos_token_id": [12, 13]}}
    config.write_text(yaml.safe_dump(document))
    other = unpack("llama-nemo", tmp_path / "nemo")
    (other / "context" / "artifacts").mkdir()
    (other / "context" / "artifacts" / "generation_config.json").write_text('{"bos_token_id": 11, "eos_token_id": [12, 13]}')
    for place in (folder, other):
        found = genai._special_tokens(preparation.plan(build_spec(place, dtype="bfloat16")))
        assert found == {"bos_token_id": 11, "eos_token_id": [12, 13], "pad_token_id": 12}


def test_inspect_of_nemo_and_of_an_archive(tmp_path: Path) -> None:
    facts, _ = inspect(str(unpack("llama-nemo", tmp_path / "checkpoint.nemo")))
    assert (facts["format"], facts["architecture"]) == ("megatron", "LlamaForCausalLM")
    archive = tmp_path / "old.nemo"
    archive.write_bytes(b"")
    with pytest.raises(SourceMissingError, match="is an archive of NeMo 1"):
        inspect(str(archive))
