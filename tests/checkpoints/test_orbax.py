"""Checkpoints that Orbax wrote, of MaxText's and Flax's trees, presented as Hugging Face's tensors."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import (
    ArchitectureError,
    OrchestratorError,
    SourceCorruptError,
    SourceMissingError,
    SpecError,
    ToolError,
    WeightMapError,
)
from orchestrator.base.extras import EXTRAS
from orchestrator.checkpoints import FORMATS, orbax, read_source, staging
from orchestrator.checkpoints.ocdbt import read_keys
from orchestrator.checkpoints.reading import RowReader
from orchestrator.cli.inspection import _TITLES, inspect
from orchestrator.compat.models import DecoderModelForCausalLM, Mapping
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.stores.source import LocalFolder
from tests.support.keras_presets import write_hugging_face
from tests.support.orbax_checkpoints import CASES, unpack

EVERY = pytest.mark.parametrize("case", CASES)


def rows(folder: Path, index: CheckpointIndex, name: str, begin: int = 0, end: int | None = None) -> bytes:
    tensor = index.tensors[name]
    end = tensor.shape[0] if end is None else end
    out = np.full((end - begin) * (tensor.num_bytes // tensor.shape[0]), 0xEE, np.uint8)
    with LocalFolder(folder).open(index.files) as source:
        RowReader(index.format, source).read(tensor, begin, end, out.data)
    return out.tobytes()


@EVERY
def test_orbax_rank_files_are_those_of_the_hugging_face_checkpoint(tmp_path: Path, case: str) -> None:
    folder, original = unpack(case, tmp_path / "orbax"), write_hugging_face(CASES[case].family, tmp_path / "hf")
    assert read_source(str(folder))[0].format == "orbax"
    for rank in range(4):
        mapping = Mapping(tp_size=2, pp_size=2, rank=rank)
        DecoderModelForCausalLM.from_jax(folder, "bfloat16", mapping).save_checkpoint(tmp_path / "ours")
        DecoderModelForCausalLM.from_hugging_face(original, "bfloat16", mapping).save_checkpoint(tmp_path / "theirs")
        for name in (f"rank{rank}.safetensors", "config.json"):
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("case", ["llama-folders", "gemma3", "gemma2-flax"])
def test_orbax_tasks_of_any_layers_read_each_byte_once(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks span: what is wanted of an array is staged in one pass, or in as many as the room needs."""
    index, _ = read_source(str(unpack(case, tmp_path)))
    expected = {name: rows(tmp_path, index, name) for name in index.tensors}
    arrays = {tensor.array.key: tensor.array for tensor in index.tensors.values() if tensor.array}
    total = sum(array.all_bytes for array in arrays.values())
    assert 0 <= total - index.num_bytes <= len(index.tensors)
    for room in (2**30, 1):
        monkeypatch.setattr(staging, "STAGED_BYTES", room)
        with LocalFolder(tmp_path).open(index.files) as source:
            reader = RowReader(index.format, source, index.tensors.values())
            for name, tensor in index.tensors.items():
                out = np.empty(tensor.num_bytes, np.uint8)
                reader.read(tensor, 0, tensor.shape[0], out.data)
                assert out.tobytes() == expected[name]
            if case == "llama-folders":  # its two layers share every chunk
                assert source.bytes_read == total if room > 1 else total < source.bytes_read < 2 * total


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_orbax_any_row_range_is_that_of_the_tensor(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(["llama3", "gemma2", "gemma-flax"]))
    folder = tmp_path_factory.getbasetemp() / f"orbax-ranges-{case}"
    if not folder.exists():
        unpack(case, folder)
    index = orbax.read_index(LocalFolder(folder))
    name = data.draw(st.sampled_from(sorted(index.tensors)))
    begin = data.draw(st.integers(0, index.tensors[name].shape[0]))
    end = data.draw(st.integers(begin, index.tensors[name].shape[0]))
    row = index.tensors[name].num_bytes // index.tensors[name].shape[0]
    assert rows(folder, index, name, begin, end) == rows(folder, index, name)[begin * row : end * row]


def test_orbax_chunks_larger_than_a_slab_are_read_by_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = read_source(str(unpack("llama", tmp_path)))
    expected = {name: rows(tmp_path, index, name) for name in index.tensors}
    for size in (1, 7, 100, 333):
        monkeypatch.setattr(staging, "_SLAB_BYTES", size)
        assert {name: rows(tmp_path, index, name) for name in index.tensors} == expected


def test_orbax_inspect_names_the_format_and_each_files_tensors(tmp_path: Path) -> None:
    facts, _ = inspect(str(unpack("llama-folders", tmp_path)))
    assert (facts["format"], facts["architecture"]) == ("orbax", "LlamaForCausalLM")
    assert len(facts["files"]) > 20
    assert _TITLES.keys() == FORMATS.keys() - {"trtllm"}


def test_orbax_optimizer_state_is_left_out(tmp_path: Path) -> None:
    index, _ = read_source(str(unpack("llama", tmp_path)))
    assert "step" in index.left_out
    assert all(name == "step" or name.startswith("opt_state") for name in index.left_out)


def read_all(folder: Path) -> None:
    index = orbax.read_index(LocalFolder(folder))
    for name in index.tensors:
        rows(folder, index, name)


def refused(folder: Path, error: type[OrchestratorError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_all(folder)
    assert type(caught.value) is error


def test_orbax_files_that_are_truncated_or_missing_are_refused(tmp_path: Path) -> None:
    unpack("qwen3", tmp_path)
    keys = read_keys(LocalFolder(tmp_path), "default/")
    value = next(value for key, value in keys.items() if key.endswith("mlp.wi_0.kernel/0.0.0"))
    assert value.key == ""
    file = tmp_path / value.file
    file.write_bytes(file.read_bytes()[: value.offset + value.num_bytes - 1])
    refused(tmp_path, SourceCorruptError, f"{file.name} is truncated: .* ends at byte ")
    file.unlink()
    refused(tmp_path, SourceMissingError, f"lacks .*{file.name}, which default/manifest.ocdbt refers to")
    manifest = tmp_path / "default" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    refused(tmp_path, SourceCorruptError, "manifest.ocdbt is truncated or damaged")


def test_orbax_damaged_tree_and_chunks_are_refused(tmp_path: Path) -> None:
    folder = unpack("llama-unscanned", tmp_path)
    for file in folder.rglob("d/*"):
        whole = bytearray(file.read_bytes())
        for at in range(0, len(whole), max(1, len(whole) // 3)):
            damaged = bytearray(whole)
            damaged[at] ^= 0xFF
            file.write_bytes(damaged)
            # Another outcome is a bit of a weight: zstd without a checksum cannot know it.
            with contextlib.suppress(SourceCorruptError, SourceMissingError):
                read_all(folder)
        file.write_bytes(whole)


def test_orbax_array_folders_that_lack_a_chunk_are_refused(tmp_path: Path) -> None:
    folder = unpack("llama-folders", tmp_path)
    (chunk,) = folder.rglob("*wi_0*/0.0.0")
    data = chunk.read_bytes()
    chunk.write_bytes(data[: len(data) // 2])
    refused(folder, SourceCorruptError, "is damaged|ends early")
    chunk.unlink()
    refused(folder, SourceMissingError, "wi_0.kernel lacks the chunk 0.0.0")


METADATA: dict[str, tuple[dict[str, Any], type[OrchestratorError], str]] = {
    "int8": ({"dtype": "|i1"}, OrchestratorError, "wi_0.kernel is quantized"),
    "complex": ({"dtype": "<c8"}, OrchestratorError, "has dtype <c8, which is not read"),
    "blosc": ({"compressor": {"id": "blosc"}}, SourceCorruptError, "compressed with blosc, which is not read"),
    "order": ({"order": "F"}, SourceCorruptError, "Fortran order"),
    "chunks": ({"chunks": [0, 2, 24]}, SourceCorruptError, "malformed shape"),
    "axes": ({"shape": [16, 2]}, SourceCorruptError, "malformed shape|damaged metadata"),
}


@pytest.mark.parametrize("damage", METADATA)
def test_orbax_arrays_that_are_not_read_are_refused(tmp_path: Path, damage: str) -> None:
    changes, error, words = METADATA[damage]
    folder = unpack("llama-folders", tmp_path)
    (path,) = folder.rglob("*wi_0*/.zarray")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(error, match=words):
        orbax.read_index(LocalFolder(folder))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FOLDERS: dict[str, tuple[Callable[[Path], object], type[OrchestratorError], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), SourceMissingError, "does not record the model's config"),
    "other layers": (lambda folder: edit(folder, num_hidden_layers=5), SourceCorruptError, "no axis has the 5 layers"),
    "other heads": (
        lambda folder: edit(folder, num_attention_heads=8, num_key_value_heads=4), SourceCorruptError,
        "has 2 heads of 4, the config says 4 of 4",
    ),
    "no number": (lambda folder: edit(folder, vocab_size=float("nan")), SourceCorruptError, "vocab_size is nan, not a positive"),
    "a text": (lambda folder: edit(folder, head_dim="4"), SourceCorruptError, "head_dim is '4', not a positive"),
    "unfinished": (
        lambda folder: (folder / "run").rename(folder / "run.orbax-checkpoint-tmp"), SourceMissingError, "was not finished",
    ),
    "other family": (lambda folder: edit(folder, architectures=["BertModel"]), ArchitectureError, "BertModel is not read"),
    "two steps": (lambda folder: unpack("gemma", folder / "other"), SpecError, "holds 2 checkpoints: other/items, run/7/items"),
}  # fmt: skip


@pytest.mark.parametrize("change", FOLDERS)
def test_orbax_folders_that_cannot_be_read_are_refused(tmp_path: Path, change: str) -> None:
    make, error, words = FOLDERS[change]
    make(unpack("llama", tmp_path))
    refused(tmp_path, error, words)


def test_orbax_head_that_is_missing_is_not_taken_for_tied(tmp_path: Path) -> None:
    folder = unpack("llama-folders", tmp_path / "source")
    (array,) = folder.rglob("*logits_dense*")
    shutil.rmtree(array)
    with pytest.raises(WeightMapError, match=r"lm_head\.weight"):
        DecoderModelForCausalLM.from_jax(folder)


def test_orbax_without_its_extra_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "orbax", ("no_such_tensorstore",))
    refused(unpack("llama", tmp_path), ToolError, "this needs the extra orbax")
