"""KerasHub's presets, written by KerasHub, presented as Hugging Face's tensors and config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import (
    ArchitectureError,
    DtypeError,
    LfsPointerError,
    OrchestratorError,
    QuantizationError,
    SourceCorruptError,
    SourceMissingError,
    ToolError,
)
from orchestrator.base.extras import EXTRAS
from orchestrator.checkpoints import keras, read_source
from orchestrator.checkpoints.reading import RowReader
from orchestrator.compat.models import DecoderModelForCausalLM, Mapping
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.stores.source import LocalFolder
from tests.support.keras_presets import CONFIGS, LOGITS, SHARDED, TOKENS, unpack, write_hugging_face

FAMILIES = pytest.mark.parametrize("family", CONFIGS)
SINGLE = "model.weights.h5"


def rows(folder: Path, index: CheckpointIndex, name: str, begin: int = 0, end: int | None = None) -> tuple[bytes, int]:
    """Rows of a tensor, and how many bytes were read for them."""
    tensor = index.tensors[name]
    end = tensor.shape[0] if end is None else end
    out = np.full((end - begin) * (tensor.num_bytes // tensor.shape[0]), 0xEE, np.uint8)
    with LocalFolder(folder).open(index.files) as source:
        RowReader(index.format, source).read(tensor, begin, end, out.data)
        return out.tobytes(), source.bytes_read


@FAMILIES
def test_keras_rank_files_are_those_of_the_hugging_face_checkpoint(tmp_path: Path, family: str) -> None:
    preset, original = unpack(family, tmp_path / "preset"), write_hugging_face(family, tmp_path / "hf")
    assert read_source(str(preset))[0].format == "keras"
    for rank in range(4):
        mapping = Mapping(tp_size=2, pp_size=2, rank=rank)
        DecoderModelForCausalLM.from_keras(preset, mapping=mapping).save_checkpoint(tmp_path / "ours")
        DecoderModelForCausalLM.from_hugging_face(original, mapping=mapping).save_checkpoint(tmp_path / "theirs")
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@FAMILIES
def test_keras_tensors_and_config_in_transformers_give_the_logits_of_keras_hub(tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    preset = unpack(family, tmp_path / "preset")
    index, _ = read_source(str(preset))
    state = {}
    for name, tensor in index.tensors.items():
        data, num_read = rows(preset, index, name)
        assert num_read == tensor.num_bytes
        state[name] = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(tensor.shape).float()
    config = AutoConfig.for_model(**{"attn_implementation": "eager", **index.config})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if index.config["tie_word_embeddings"] else set())
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits.numpy()
    expected = np.load(preset / LOGITS)
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_keras_any_row_range_reads_its_bytes_only(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "keras-ranges"
    if not folder.exists():
        unpack("gemma2", folder)
    index = keras.read_index(LocalFolder(folder))
    name = data.draw(st.sampled_from(sorted(index.tensors)))
    tensor = index.tensors[name]
    begin = data.draw(st.integers(0, tensor.shape[0]))
    end = data.draw(st.integers(begin, tensor.shape[0]))
    row = tensor.num_bytes // tensor.shape[0]
    assert rows(folder, index, name, begin, end) == (rows(folder, index, name)[0][begin * row : end * row], (end - begin) * row)


def test_keras_publishes_a_tokenizer_of_sentencepiece_and_no_file_that_would_be_taken_for_another(tmp_path: Path) -> None:
    index, files = read_source(str(unpack(SHARDED, tmp_path / "task")))
    assert (tmp_path / "task" / "assets" / "tokenizer" / "merges.txt").read_text() == "a b\n"
    assert (tmp_path / "task" / "tokenizer.json").is_file()
    assert files == ()
    assert any("without source.tokenizer" in warning for warning in index.warnings)
    preset = unpack("gemma", tmp_path / "gemma")
    (preset / "assets" / "tokenizer").mkdir(parents=True)
    (preset / "assets" / "tokenizer" / "vocabulary.spm").write_bytes(b"sentencepiece")
    _, files = read_source(str(preset))
    assert [keras.PUBLISHED[file.name] for file in files] == ["tokenizer.model"]


def test_keras_query_scale_that_keras_hub_does_not_compute_is_that_of_the_config_with_a_warning(tmp_path: Path) -> None:
    preset = unpack("gemma2", tmp_path / "preset")
    change(preset / "config.json", lambda plain: plain["config"].update(query_head_dim_normalize=False))
    index, _ = read_source(str(preset))
    assert index.config["query_pre_attn_scalar"] == 16 // 4
    assert any("computes with 1/sqrt(head_dim)" in warning for warning in index.warnings)


def refused(folder: Path, error: type[OrchestratorError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        keras.read_index(LocalFolder(folder))
    assert type(caught.value) is error


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    plain = json.loads(path.read_text())
    edit(plain)
    path.write_text(json.dumps(plain))


def test_keras_file_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    preset = unpack("llama", tmp_path / "preset")
    whole = (preset / SINGLE).read_bytes()
    for size in (*range(0, len(whole), len(whole) // 40), len(whole) - 1):
        (preset / SINGLE).write_bytes(whole[:size])
        refused(preset, SourceCorruptError, "truncated or damaged")
    (preset / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(preset, LfsPointerError, "Git-LFS pointer")


def test_keras_shards_that_are_missing_or_swapped_are_refused(tmp_path: Path) -> None:
    preset = unpack(SHARDED, tmp_path / "preset")
    shards = sorted(preset.glob("*.h5"))
    assert len(shards) > 1
    kept = shards[1].read_bytes()
    shards[1].unlink()
    refused(preset, SourceMissingError, f"names the shard {shards[1].name}, which is missing")
    shutil.copy(shards[0], shards[1])
    refused(preset, SourceCorruptError, "does not list .* in model_00001.weights.h5, which holds it")
    shards[1].write_bytes(kept)
    change(preset / "model.weights.json", lambda plain: plain["weight_map"].popitem())
    refused(preset, SourceCorruptError, "does not list")
    change(preset / "model.weights.json", lambda plain: plain["weight_map"].update({"/layers/x/vars": "../x.weights.h5"}))
    refused(preset, SourceCorruptError, "not a weights file of this folder")
    (preset / "model.weights.json").unlink()
    refused(preset, SourceMissingError, "has neither model.weights.h5 nor model.weights.json")


_QUERY = "layers/llama_transformer_decoder_1/_self_attention_layer/_query_dense/vars"


def _replace(file: h5py.File, **created: Any) -> None:
    del file[f"{_QUERY}/0"]
    file.create_dataset(f"{_QUERY}/0", **created)


DAMAGES: dict[str, tuple[Callable[[h5py.File], object], type[OrchestratorError], str]] = {
    "missing": (lambda file: file.__delitem__(f"{_QUERY}/0"), SourceCorruptError, "metadata.json says"),
    "int8": (lambda file: _replace(file, data=np.zeros((16, 4, 4), np.int8)), QuantizationError, r"is quantized \(int8\)"),
    "complex": (lambda file: _replace(file, data=np.zeros((16, 4, 4), np.complex64)), DtypeError, "has dtype complex64"),
    "compressed": (
        lambda file: _replace(file, data=np.zeros((16, 4, 4), np.float32), compression="gzip"), SourceCorruptError, "in one piece",
    ),
    "axes": (lambda file: _replace(file, data=np.zeros(256, np.float32)), SourceCorruptError, "2 axes were expected"),
    "label": (
        lambda file: file["layers/llama_transformer_decoder_1/vars"].attrs.__setitem__("name", "transformer_layer_0"),
        SourceCorruptError, "labelled transformer_layer_0, not as layer 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_keras_datasets_that_cannot_be_are_refused(tmp_path: Path, damage: str) -> None:
    edit, error, words = DAMAGES[damage]
    preset = unpack("llama", tmp_path / "preset")
    with h5py.File(preset / SINGLE, "r+") as file:
        edit(file)
    refused(preset, error, words)


@pytest.mark.parametrize(
    ("family", "changes", "error", "words"),
    [
        ("llama", {"num_layers": 0}, SourceCorruptError, "num_layers is 0"),
        ("llama", {"rope_max_wavelength": None}, SourceCorruptError, "of another type"),
        ("llama", {"new_switch": True}, ArchitectureError, "fields that are not known: new_switch"),
        ("qwen3", {"tie_word_embeddings": True}, SourceCorruptError, "the weights hold a head of its own"),
        ("gemma2", {"use_post_ffw_norm": False}, ArchitectureError, "either both"),
        ("gemma3", {"vision_encoder": {"class_name": "x"}}, ArchitectureError, "with vision_encoder is not read"),
    ],
)
def test_keras_configs_that_cannot_be_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], error: type[OrchestratorError], words: str
) -> None:
    preset = unpack(family, tmp_path / "preset")
    change(preset / "config.json", lambda plain: plain["config"].update(changes))
    refused(preset, error, words)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"num_query_heads": 8, "num_key_value_heads": 4}, "has 2 heads of 4, the config says 4 of 2"),
        ("mistral", {"num_key_value_heads": 4}, "has 2 heads of 8, the config says 4 of 8"),
        ("gemma2", {"head_dim": 4}, "has 2 heads of 8, the config says 2 of 4"),
        ("gemma2", {"num_layers": 10**9}, "num_layers is 1000000000"),
        ("llama", {"rope_max_wavelength": "long"}, "of another type"),
    ],
)
def test_keras_config_of_other_sizes_than_the_weights_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], words: str
) -> None:
    preset = unpack(family, tmp_path / "preset")
    change(preset / "config.json", lambda plain: plain["config"].update(changes))
    refused(preset, SourceCorruptError, words)


def test_keras_head_that_may_be_missing_is_refused_or_warned_of(tmp_path: Path) -> None:
    for family in ("mistral", "llama"):
        preset = unpack(family, tmp_path / family)
        with h5py.File(preset / SINGLE, "r+") as file:
            del file["layers/reversible_embedding/vars/1"]
        (preset / "metadata.json").unlink()
    refused(tmp_path / "mistral", SourceCorruptError, "the weights hold no head of its own")
    index = keras.read_index(LocalFolder(tmp_path / "llama"))
    assert any("it is not known whether it is missing" in warning for warning in index.warnings)


def test_keras_backbone_that_is_not_read_is_named(tmp_path: Path) -> None:
    preset = unpack("llama", tmp_path / "preset")
    change(preset / "config.json", lambda plain: plain.update(class_name="BertBackbone"))
    refused(preset, ArchitectureError, "is of a BertBackbone, which is not read")
    change(preset / "config.json", lambda plain: plain.pop("class_name"))
    refused(preset, SourceCorruptError, "lacks class_name or config")


def test_keras_without_its_extra_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "keras", ("no_such_h5py",))
    refused(unpack("llama", tmp_path / "preset"), ToolError, "this needs the extra keras")
