"""Meta's files presented as Hugging Face's tensors: every row range of every split, and the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import ArchitectureError, OrchestratorError, QuantizationError, SourceCorruptError, SourceMissingError
from orchestrator.checkpoints import format_named, meta, read_source
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.model.config import ModelConfig
from orchestrator.stores.source import LocalFolder
from tests.support.meta import write_meta
from tests.support.synthetic import Array, model_config, random_arrays, write_source


def meta_config(num_files: int = 4, kv_heads: int = 4, **changes: Any) -> ModelConfig:
    """Whatever number of key/value heads: four files may split one head."""
    heads = 2 * max(num_files, kv_heads)
    fields = {
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_size": 4, "hidden_size": 4 * heads,
        "intermediate_size": 4 * num_files, "vocab_size": 10 * num_files, "num_hidden_layers": 1,
    }  # fmt: skip
    return model_config(**{**fields, **changes})


def read(folder: Path, index: CheckpointIndex, name: str, begin: int = 0, end: int | None = None) -> tuple[bytes, int]:
    """Rows of a tensor, and how many bytes were read for them."""
    tensor = index.tensors[name]
    end = tensor.shape[0] if end is None else end
    out = np.full((end - begin) * (tensor.num_bytes // tensor.shape[0]), 0xEE, np.uint8)
    with LocalFolder(folder).open(index.files) as source:
        format_named(index.format).read_rows(source, tensor, begin, end, out.data)
        return out.tobytes(), source.bytes_read


def same(folder: Path, arrays: dict[str, Array]) -> CheckpointIndex:
    """Assert that a folder presents exactly `arrays`."""
    index, _ = read_source(str(folder))
    assert {name: tensor.shape for name, tensor in index.tensors.items()} == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        assert read(folder, index, name) == (array.tobytes(), array.nbytes), name
    return index


@pytest.mark.parametrize("llama3", [False, True])
@pytest.mark.parametrize(("num_files", "kv_heads"), [(1, 4), (2, 2), (4, 8), (8, 8), (4, 2), (8, 2), (8, 4)])
def test_meta_presents_the_tensors_of_hugging_face(tmp_path: Path, num_files: int, kv_heads: int, llama3: bool) -> None:
    config = meta_config(num_files, kv_heads)
    arrays = random_arrays(config)
    index = same(write_meta(tmp_path, config, arrays, num_files, llama3=llama3), arrays)
    assert index.format == "meta"
    assert len(index.files) == num_files


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_meta_any_row_range_reads_each_byte_about_once(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    config = meta_config()
    arrays = random_arrays(config)
    folder = tmp_path_factory.getbasetemp() / "meta-ranges"
    if not folder.exists():
        write_meta(folder, config, arrays, 4)
    index = meta.read_index(LocalFolder(folder))
    name = data.draw(st.sampled_from(sorted(arrays)))
    begin = data.draw(st.integers(0, len(arrays[name])))
    end = data.draw(st.integers(begin, len(arrays[name])))
    found, num_read = read(folder, index, name, begin, end)
    assert found == arrays[name][begin:end].tobytes()
    at_the_ends = 2 * config.head_size * arrays[name][:1].nbytes  # rows of a head lie apart: the heads at the ends are read whole
    assert num_read <= len(found) + at_the_ends


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_meta_of_other_dtypes_and_tied_embeddings(tmp_path: Path, dtype: str) -> None:
    config = meta_config(2, 2, tie_word_embeddings=True)
    arrays = random_arrays(config, dtype)
    index = same(write_meta(tmp_path, config, arrays, 2, llama3=True), arrays)
    assert index.config["tie_word_embeddings"] is True


def test_meta_config_has_the_keys_of_hugging_face(tmp_path: Path) -> None:
    config = meta_config(2, 2)
    index = meta.read_index(LocalFolder(write_meta(tmp_path, config, random_arrays(config), 2)))
    assert index.config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }  # fmt: skip


RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-1-7b": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": -1},
        {"intermediate_size": 11008, "num_key_value_heads": 32, "max_position_embeddings": 2048, "rope_scaling": None},
    ),
    "llama-2-70b": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80},
        {"intermediate_size": 28672, "num_key_value_heads": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "llama-3-8b": (
        {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32,
         "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256},
        {"intermediate_size": 14336, "max_position_embeddings": 8192, "rope_theta": 500000.0, "vocab_size": 128256},
    ),
    "llama-3.1-405b": (
        {"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "n_heads": 128, "n_kv_heads": 8, "n_layers": 126,
         "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256},
        {"intermediate_size": 53248, "max_position_embeddings": 131072, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
    ),
    "llama-3.2-1b": (
        {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32, "n_kv_heads": 8, "n_layers": 16,
         "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256},
        {"intermediate_size": 8192, "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
    ),
}  # fmt: skip
"""params.json of Meta's releases and what config.json of the same model says on the Hugging Face hub."""


@pytest.mark.parametrize("release", RELEASES)
def test_meta_config_of_a_release_is_that_of_the_hub(tmp_path: Path, release: str) -> None:
    params, expected = RELEASES[release]
    config = meta_config(1, 2, vocab_size=32000)
    write_meta(tmp_path, config, random_arrays(config))
    tensors = meta.read_index(LocalFolder(tmp_path)).tensors
    found = meta._config(params, tensors)
    assert {key: found[key] for key in expected} == expected
    assert found["vocab_size"] == max(params.get("vocab_size", -1), 32000)


def test_meta_does_not_shadow_hugging_face(tmp_path: Path) -> None:
    config = meta_config(2, 2)
    arrays = random_arrays(config)
    folder = write_source(tmp_path / "both", config, arrays)
    write_meta(folder, config, arrays, 2)
    assert read_source(str(folder))[0].format == "huggingface"
    assert read_source(str(folder), "meta")[0].format == "meta"
    write_meta(folder / "original", config, arrays, 2)
    assert read_source(str(folder / "original"))[0].format == "meta"


def refused(folder: Path, error: type[OrchestratorError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        meta.read_index(LocalFolder(folder))
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"n_heads": 0}, SourceCorruptError, "n_heads is 0"),
        ({"dim": None}, SourceCorruptError, "dim is None"),
        ({"n_heads": 3}, SourceCorruptError, "3 heads do not divide"),
        ({"quantization_args": {"scheme": "int8"}}, QuantizationError, "already quantized"),
        ({"moe_args": {"num_experts": 16}}, ArchitectureError, "not a dense text model"),
    ],
)
def test_meta_params_that_cannot_be_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[OrchestratorError], words: str
) -> None:
    config = meta_config(1, 2)
    params = write_meta(tmp_path, config, random_arrays(config)) / "params.json"
    params.write_text(json.dumps({**json.loads(params.read_text()), **changes}))
    refused(tmp_path, error, words)


def test_meta_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    import torch

    config = meta_config(4, 4)
    write_meta(tmp_path, config, random_arrays(config), 4)
    state = torch.load(tmp_path / "consolidated.02.pth", weights_only=True)
    torch.save({**state, "norm.weight": state["norm.weight"].float()}, tmp_path / "consolidated.02.pth")
    refused(tmp_path, SourceCorruptError, "norm.weight does not have the same dtype")
    torch.save({**state, "more": torch.ones(1)}, tmp_path / "consolidated.02.pth")
    refused(tmp_path, SourceCorruptError, "more is in only one of")
    del state["output.weight"]
    torch.save(state, tmp_path / "consolidated.02.pth")
    refused(tmp_path, SourceCorruptError, r"output.weight is in consolidated\.00\.pth but not in all")
    (tmp_path / "consolidated.02.pth").rename(tmp_path / f"consolidated.{10**20}.pth")
    refused(tmp_path, SourceMissingError, r"lacks consolidated\.02\.pth of 1")
    (tmp_path / f"consolidated.{10**20}.pth").unlink()
    refused(tmp_path, SourceMissingError, r"lacks consolidated\.02\.pth of 4 files")
