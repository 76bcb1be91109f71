"""The language model within a larger model: read in place, and compared with what transformers' larger model computes of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.base.errors import ArchitectureError
from orchestrator.checkpoints import read_source
from orchestrator.families import family_for
from orchestrator.families.wrappers import REFUSED, WRAPPERS, architecture_of, language_config
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.topology import Topology
from orchestrator.planning import preparation
from orchestrator.work.miniature.prompts import Prompt
from orchestrator.work.miniature.ranks import Ranks, convert
from tests.conftest import SpecMaker
from tests.support.families import write_tiny
from tests.support.wrappers import write_wrapper

RENAMED = {
    "InternVLChatModel": "qwen2",
    "KimiK25ForConditionalGeneration": "deepseek_v3",
    "KimiVLForConditionalGeneration": "deepseek_v3",
}
"""Architectures that transformers 5.14 has no class for -> family of the language model."""
RENAMES_LAYERS = {"Kimi_K25ForConditionalGeneration"}
"""Architectures whose layers transformers 5.14 renames when it saves them: no checkpoint of the hub is like that."""
TOKENS = tuple(int(token) for token in np.random.default_rng(1).integers(3, 100, 12))


def computed(folder: Path, work: Path) -> tuple[CheckpointIndex, npt.NDArray[np.float32]]:
    """The index of the language model in `folder`, and our logits of TOKENS, the last two decoded one by one."""
    index, _ = read_source(str(folder))
    architecture = architecture_of(index.config, str(folder))
    assert architecture is not None
    family = family_for(architecture)
    config = from_hugging_face(index.config, architecture, "float32", family.config)
    weights = convert(folder, work, family, config, Topology(1, 1))
    return index, Ranks(config, Topology(1, 1), weights, 16).logits(Prompt(TOKENS, 2))


def relative_error(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("architecture", sorted(WRAPPERS - RENAMED.keys() - RENAMES_LAYERS))
def test_language_model_computes_of_text_what_the_larger_model_does(architecture: str, tmp_path: Path) -> None:
    import torch

    larger = write_wrapper(architecture, tmp_path / "model")
    with torch.inference_mode():
        expected = larger(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    index, ours = computed(tmp_path / "model", tmp_path / "ranks")
    if "logit_scale" in index.config:  # which transformers' larger models pass over, and Cohere's own do not
        expected = expected * index.config["logit_scale"]
    assert relative_error(ours, expected) < 1e-5
    assert index.part_of == architecture
    assert f"only the language model of {architecture} is built" in index.warnings[0]
    assert set(index.left_out).isdisjoint(index.tensors)


TIED = ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]


@pytest.mark.parametrize("architecture", TIED)
@pytest.mark.parametrize("is_said", [True, False])
def test_head_that_the_larger_model_ties_is_the_embedding(architecture: str, is_said: bool, tmp_path: Path) -> None:
    import torch

    larger = write_wrapper(architecture, tmp_path / "model", tie_word_embeddings=True)
    with torch.inference_mode():
        expected = larger(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    if not is_said:
        path = tmp_path / "model" / "config.json"
        config = json.loads(path.read_text())
        del config["tie_word_embeddings"]
        config["text_config"].pop("tie_word_embeddings", None)
        path.write_text(json.dumps(config))
    index, ours = computed(tmp_path / "model", tmp_path / "ranks")
    assert index.config["tie_word_embeddings"]
    assert relative_error(ours, expected) < 1e-5


def renamed(architecture: str, folder: Path) -> Path:
    """A larger model as its publisher stores it: the language model under a prefix, its config under a key."""
    from safetensors.numpy import load_file, save_file

    plain = write_tiny(RENAMED[architecture], folder / "plain", dtype="float32")
    text = json.loads((plain / "config.json").read_text())
    text |= {"model_type": "kimi_k2"} if architecture.startswith("KimiK2") else {}
    key = "llm_config" if architecture == "InternVLChatModel" else "text_config"
    larger = folder / "larger"
    larger.mkdir()
    (larger / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "other", key: text}))
    tensors = {f"language_model.{name}": array for name, array in load_file(plain / "model.safetensors").items()}
    save_file({**tensors, "vision_model.patch.bias": np.zeros(4, np.float32)}, larger / "model.safetensors")
    return larger


@pytest.mark.parametrize("architecture", sorted(RENAMED))
def test_language_model_of_a_publisher_s_own_class_is_the_plain_one(architecture: str, tmp_path: Path) -> None:
    larger = renamed(architecture, tmp_path)
    index, ours = computed(larger, tmp_path / "ranks")
    _, plain = computed(tmp_path / "plain", tmp_path / "plain-ranks")
    assert np.array_equal(ours, plain)
    assert index.left_out == {"vision_model.patch.bias": "it belongs to another part of the model than its language model"}


def test_sizes_that_a_published_text_config_lacks_are_those_of_its_class() -> None:
    """As in Llava 1.5 and Gemma 3."""
    llava = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064},
    }
    found = language_config(llava)
    assert (found["hidden_size"], found["num_hidden_layers"], found["vocab_size"]) == (4096, 32, 32064)
    gemma = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    }
    assert language_config(gemma)["num_key_value_heads"] == 4


@pytest.mark.parametrize(("has_head", "is_tied"), [(True, False), (False, True)])
def test_head_is_tied_if_no_file_says_and_none_is_stored(has_head: bool, is_tied: bool) -> None:
    config: dict[str, Any] = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "llama"}}
    assert language_config(config, has_head)["tie_word_embeddings"] is is_tied
    config["tie_word_embeddings"] = not is_tied
    assert language_config(config, has_head)["tie_word_embeddings"] is not is_tied


def test_flat_config_of_qwen2_vl_is_read_without_the_axes_of_images() -> None:
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 64, "vision_config": {},
        "image_token_id": 5, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6,
    }  # fmt: skip
    found = language_config(config)
    assert found["model_type"] == "qwen2"
    assert found["rope_scaling"] == {"type": "default"}
    assert "image_token_id" not in found


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_larger_model_of_another_kind_is_refused_with_the_reason(architecture: str) -> None:
    with pytest.raises(ArchitectureError, match="its language model is not one of the families") as caught:
        architecture_of({"architectures": [architecture], "text_config": {"model_type": "gemma"}}, "here")
    assert REFUSED[architecture] in caught.value.message


def test_unknown_larger_model_around_a_known_one_says_that_its_language_model_would_do() -> None:
    config = {"architectures": ["NewVisionModel"], "text_config": {"model_type": "qwen3"}}
    with pytest.raises(ArchitectureError, match="Its text_config is a qwen3, which is supported") as caught:
        architecture_of(config, "here")
    assert "Save the language model as a separate checkpoint" in caught.value.advice


def test_unknown_larger_model_around_an_unknown_one_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="is of an unknown kind: 'mamba9'"):
        architecture_of({"architectures": ["NewVisionModel"], "text_config": {"model_type": "mamba9"}}, "here")


def test_tensor_within_the_language_model_that_no_rule_reads_is_an_error(tmp_path: Path, make_spec: SpecMaker) -> None:
    """Only other parts are left out: nothing of the language model is dropped."""
    from safetensors.numpy import load_file, save_file

    from orchestrator.base.errors import WeightMapError

    larger = renamed("InternVLChatModel", tmp_path)
    tensors = load_file(larger / "model.safetensors")
    save_file({**tensors, "language_model.model.layers.0.cross_attn.gate": np.zeros(1, np.float32)}, larger / "model.safetensors")
    with pytest.raises(WeightMapError, match=r"model\.layers\.0\.cross_attn\.gate"):
        preparation.plan(make_spec(larger))


CONFIGS = sorted((Path(__file__).parents[1] / "data" / "larger_models").glob("*.json"))
"""config.json of larger models, whole."""


def is_read(config: dict[str, Any]) -> bool:
    return config["architectures"][0] in WRAPPERS and config.get("llm_config", {}).get("model_type") != "internlm2"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_config_of_a_larger_model_is_read_or_refused(path: Path) -> None:
    """Where it is read, the language model has the sizes that transformers' larger class gives it."""
    import transformers

    config = json.loads(path.read_text())
    if not is_read(config):
        with pytest.raises(ArchitectureError) as caught:
            language_config(config)
        assert caught.value.advice
        return
    found = language_config(config)
    family = family_for(found["architectures"][0])
    ours = from_hugging_face(found, found["architectures"][0], "bfloat16", family.config)
    if config["architectures"][0] in RENAMED:  # transformers has no class
        return
    theirs = transformers.AutoConfig.for_model(**config).get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_size == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    parameters = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.rotary_base == parameters["rope_theta"]


def test_published_configs_of_larger_models_are_of_many_kinds() -> None:
    architectures = [json.loads(path.read_text())["architectures"][0] for path in CONFIGS]
    assert len(CONFIGS) >= 30
    assert len(set(architectures) & WRAPPERS) >= 15
    assert len(set(architectures) & REFUSED.keys()) >= 5
