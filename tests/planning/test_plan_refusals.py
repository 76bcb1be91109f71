"""What would fail late, after hours of conversion, is refused when the plan is made: with the key or file, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import stages
from orchestrator.base.errors import ArchitectureError, OrchestratorError, SourceCorruptError, SpecError, WeightMapError
from orchestrator.compat.models import DecoderModelForCausalLM
from orchestrator.planning import preparation
from orchestrator.planning.options import ReferenceOptions
from orchestrator.spec.build import BuildSpec
from orchestrator.work.reference import step as reference
from tests.support.synthetic import Array, build_spec, model_config, random_arrays, write_source

CONFIG = model_config()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "model", CONFIG, random_arrays(CONFIG))


def change(folder: Path, **keys: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **keys}))


def refusal(source: Path, tmp_path: Path, **sections: Any) -> OrchestratorError:
    """The error of `plan`; `convert` ends with the same, and writes nothing."""
    spec = build_spec(source, **sections)
    with pytest.raises(OrchestratorError) as planned:
        preparation.plan(spec)
    output = tmp_path / "checkpoint"
    with pytest.raises(type(planned.value)):
        stages.convert(spec, output)
    assert not output.exists()
    return planned.value


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [3]}, "architectures"),
        ({"architectures": {"a": 1}}, "architectures"),
        ({"architectures": []}, "names no architecture"),
        ({"rope_parameters": {"rope_type": "novel", "factor": 2.0}}, "'novel' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"hidden_act": "relu2"}, "hidden_act in config.json"),
        ({"num_local_experts": 8}, "'num_local_experts'"),
        ({"text_config": {"hidden_size": 16}, "architectures": ["Gemma3ForConditionalGeneration"]}, "text_config"),
    ],
)
def test_plan_of_a_config_that_is_not_built_names_the_key(source: Path, tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    change(source, **keys)
    error = refusal(source, tmp_path)
    assert isinstance(error, ArchitectureError | SourceCorruptError)
    assert named in error.message
    assert error.advice
    with pytest.raises(type(error)):
        DecoderModelForCausalLM.from_hugging_face(source)


def test_plan_of_an_unknown_key_that_the_spec_ignores_is_made(source: Path) -> None:
    change(source, novel_feature=3)
    spec = build_spec(source)
    ignoring = spec.model_copy(update={"source": spec.source.model_copy(update={"ignored_keys": ("novel_feature",)})})
    assert preparation.plan(ignoring).inputs.config == CONFIG


def of_family(source: Path, family: str) -> BuildSpec:
    spec = build_spec(source)
    return spec.model_copy(update={"source": spec.source.model_copy(update={"family": family})})


def test_plan_of_a_family_that_transformers_would_not_load_is_refused(source: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"source.family is mistral, but model_type .* 'llama'"):
        preparation.plan(of_family(source, "mistral"))


def test_plan_of_a_named_family_and_a_type_that_nobody_knows_is_made(source: Path) -> None:
    change(source, model_type="my_llama", architectures=["MyLlamaForCausalLM"])
    assert preparation.plan(of_family(source, "llama")).inputs.config.num_hidden_layers == CONFIG.num_hidden_layers
    change(source, model_type=None, architectures=["LlamaForCausalLM"])
    with pytest.raises(ArchitectureError, match="model_type"):
        preparation.plan(build_spec(source))


def test_plan_warns_of_keys_that_are_passed_over(source: Path) -> None:
    change(source, sliding_window=4096)
    assert any("sliding_window 4096" in warning for warning in preparation.plan(build_spec(source)).warnings)


Rename = Callable[[str], str]


@pytest.mark.parametrize(
    "rename",
    [lambda name: f"language_model.{name}", lambda name: name.replace("model.", "model.language_model.", 1)],
    ids=["before", "within"],
)
def test_plan_of_a_language_model_within_a_larger_one_reports_its_prefix(tmp_path: Path, rename: Rename) -> None:
    arrays: dict[str, Array] = {rename(name): array for name, array in random_arrays(CONFIG).items()}
    source = write_source(tmp_path / "model", CONFIG, arrays)
    error = refusal(source, tmp_path)
    assert isinstance(error, WeightMapError)
    assert rename("model.embed_tokens.weight") in error.message
    assert "language model" in error.advice


@pytest.mark.parametrize("bias", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_plan_of_biases_that_config_json_does_not_name_reports_them(tmp_path: Path, bias: str) -> None:
    arrays = random_arrays(CONFIG) | {f"model.layers.0.{bias}.bias": np.zeros(4, np.float32)}
    error = refusal(write_source(tmp_path / "model", CONFIG, arrays), tmp_path)
    assert f"model.layers.0.{bias}.bias" in error.message


def test_plan_of_a_bias_that_the_family_lacks_names_its_key(tmp_path: Path) -> None:
    config = model_config(attn_bias=True, attn_dense_bias=True)
    source = write_source(tmp_path / "model", config, random_arrays(config))
    change(source, architectures=["MistralForCausalLM"], model_type="mistral")
    assert "attention_bias" in refusal(source, tmp_path).message


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "pytorch_model.bin.index.json", "model.safetensors.index.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", [b'{"a": ', b"[1]", b"\xff", b"[" * 100_000], ids=["cut", "list", "bytes", "deep"])
def test_plan_of_a_broken_file_beside_the_weights_names_it(source: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (source / name).write_bytes(content)
    error = refusal(source, tmp_path)
    assert isinstance(error, SourceCorruptError)
    assert f"{source}/{name}" in error.message


class Tokenizer:
    """One token for each letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 30 for letter in text]}


def sequences(monkeypatch: pytest.MonkeyPatch, folder: Path, prompts: tuple[str, ...]) -> list[list[int]]:
    import transformers

    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_args, **_kwargs: Tokenizer())
    options = ReferenceOptions(format="huggingface", files=(), dtype="float32", vocab_size=37, prompts=prompts, max_tokens=12)
    return reference._sequences(options, folder)[0]


def test_prompts_of_one_token_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [len(sequence) for sequence in sequences(monkeypatch, tmp_path, ("a", "abc"))] == [1, 3]


def test_prompts_without_a_token_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no tokens for the verification prompt ''"):
        sequences(monkeypatch, tmp_path, ("abc", ""))
