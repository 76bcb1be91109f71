from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from orchestrator.base.errors import LfsPointerError, OrchestratorError, SourceCorruptError, SourceMissingError
from orchestrator.checkpoints import companions, huggingface, safetensors
from orchestrator.checkpoints.hugging_face_config import hugging_face_config
from orchestrator.families import FAMILIES
from orchestrator.model.checkpoint import SourceFile
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_trtllm import from_trtllm, to_trtllm
from orchestrator.model.topology import Topology
from orchestrator.stores.source import FileSource, LocalFolder
from tests.support.families import TINY, tiny_config
from tests.support.synthetic import FIXED_TIME_NS, encode_safetensors, frame, model_config, random_arrays, write_source

CONFIG = model_config()
ARRAYS = random_arrays(CONFIG)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_source(tmp_path / "single", CONFIG, ARRAYS)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_source(tmp_path / "sharded", CONFIG, ARRAYS, num_files=3)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05d}-of-00003.safetensors"


def refused(folder: Path, error: type[OrchestratorError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        huggingface.read_index(LocalFolder(folder))
    assert type(caught.value) is error


@pytest.mark.parametrize("num_files", [1, 3])
def test_read_index_every_tensor_points_at_its_bytes(tmp_path: Path, num_files: int) -> None:
    folder = write_source(tmp_path, CONFIG, ARRAYS, num_files=num_files)
    index = huggingface.read_index(LocalFolder(folder))
    assert set(index.tensors) == set(ARRAYS)
    assert len(index.files) == num_files
    for name, tensor in index.tensors.items():
        data = (folder / index.files[tensor.file].name).read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes]
        assert (tensor.name, tensor.dtype, tensor.shape) == (name, "BF16", ARRAYS[name].shape)
        assert data == ARRAYS[name].tobytes()


def test_read_index_knows_sizes_and_config(single: Path) -> None:
    index = huggingface.read_index(LocalFolder(single))
    assert index.format == "huggingface"
    assert index.config["hidden_size"] == CONFIG.hidden_size
    assert index.num_bytes == sum(array.nbytes for array in ARRAYS.values())
    assert [file.num_bytes for file in index.files] == [(single / WEIGHTS).stat().st_size]


def test_read_index_one_file_of_any_name_is_enough(single: Path) -> None:
    (single / WEIGHTS).rename(single / "weights.safetensors")
    assert [file.name for file in huggingface.read_index(LocalFolder(single)).files] == ["weights.safetensors"]


def test_read_index_files_are_sorted_and_unlisted_ones_left_out(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(encode_safetensors(ARRAYS))
    assert [file.name for file in huggingface.read_index(LocalFolder(sharded)).files] == [
        shard(sharded, number).name for number in (1, 2, 3)
    ]


def test_read_index_missing_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", SourceMissingError, "there is no folder")


def test_read_index_missing_config_is_named(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, SourceMissingError, "config.json is missing")


def test_read_index_folder_without_weights_is_refused(single: Path) -> None:
    (single / WEIGHTS).unlink()
    refused(single, SourceMissingError, "has no safetensors weights")


def test_read_index_several_files_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / huggingface.INDEX).unlink()
    refused(sharded, SourceMissingError, "has 3 safetensors files but no")


def test_read_index_missing_shard_is_named(sharded: Path) -> None:
    shard(sharded, 2).unlink()
    refused(sharded, SourceMissingError, "names the shard model-00002-of-00003.safetensors")


@pytest.mark.parametrize("kept", [-1, -100, 20, 8, 3, 0])
def test_read_index_truncated_file_is_refused(single: Path, kept: int) -> None:
    data = (single / WEIGHTS).read_bytes()
    (single / WEIGHTS).write_bytes(data[:kept])
    refused(single, SourceCorruptError, "truncated")


@given(kept=st.integers(0, len(encode_safetensors(ARRAYS)) - 1))
def test_read_header_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, kept: int) -> None:
    path = tmp_path_factory.mktemp("cut") / WEIGHTS
    path.write_bytes(encode_safetensors(ARRAYS)[:kept])
    with pytest.raises(SourceCorruptError):
        safetensors.read_header(path)


def test_read_index_trailing_bytes_are_refused(single: Path) -> None:
    with (single / WEIGHTS).open("ab") as file:
        file.write(b"\0\0\0")
    refused(single, SourceCorruptError, "has 3 bytes that its header does not name")


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "num_bytes", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b starts at byte"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "starts at byte"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b starts at byte"),
        ({"a": entry(4, 12)}, 12, "a starts at byte"),
        ({"a": entry(0, 12)}, 12, "do not hold F32"),
        ({"a": entry(8, 0)}, 8, "do not hold F32"),
        ({"a": entry(-8, 0)}, 8, "a has the malformed data_offsets"),
        ({"a": entry(0, 8, "Q5_K")}, 8, "unknown dtype 'Q5_K'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "header is damaged"),
        ({"a": 5}, 0, "header is damaged"),
        ({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}, 8, "header is damaged"),
        ([], 0, "header is damaged"),
    ],
)
def test_read_header_that_lies_is_refused(tmp_path: Path, header: Any, num_bytes: int, words: str) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(frame(header, b"\0" * num_bytes))
    with pytest.raises(SourceCorruptError, match=words):
        safetensors.read_header(path)


@pytest.mark.parametrize("start", [b"\xff" * 8, (10**9).to_bytes(8, "little"), b"PK\x03\x04\0\0\0\0"])
def test_read_header_of_another_format_is_refused(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(start + b"{}" * 100)
    with pytest.raises(SourceCorruptError, match="not a safetensors file"):
        safetensors.read_header(path)


def test_read_header_text_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes((4).to_bytes(8, "little") + b"\xff{]x")
    with pytest.raises(SourceCorruptError, match="header is damaged"):
        safetensors.read_header(path)


def test_read_header_metadata_empty_tensors_and_any_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    header = {"z": entry(8, 16), "__metadata__": {"format": "pt"}, "empty": entry(8, 8, shape=(0, 3)), "a": entry(0, 8)}
    path.write_bytes(frame(header, b"\0" * 16))
    entries, metadata = safetensors.read_header(path)
    assert [item.name for item in entries] == ["a", "empty", "z"]
    assert metadata == {"format": "pt"}


def test_encode_header_is_read_back_and_aligned(tmp_path: Path) -> None:
    wanted = [("b", "BF16", (2, 3)), ("a", "F32", (4,)), ("scalar", "I64", ())]
    header = safetensors.encode_header(wanted, {"format": "pt"})
    assert len(header) % 4096 == 0
    path = tmp_path / WEIGHTS
    path.write_bytes(header + b"\0" * (12 + 16 + 8))
    entries, metadata = safetensors.read_header(path)
    assert [(item.name, item.dtype, item.shape) for item in entries] == wanted
    assert [item.offset - len(header) for item in entries] == [0, 12, 28]
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_read_index_lfs_pointer_is_recognised(single: Path, name: str) -> None:
    (single / name).write_bytes(POINTER)
    refused(single, LfsPointerError, f"{name} is a Git-LFS pointer")
    with pytest.raises(LfsPointerError) as caught:
        huggingface.read_index(LocalFolder(single))
    assert "git lfs pull" in caught.value.advice


def test_read_index_lfs_pointer_among_shards_is_recognised(sharded: Path) -> None:
    shard(sharded, 3).write_bytes(POINTER)
    refused(sharded, LfsPointerError, "model-00003")


def test_read_index_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    twice = next(iter(ARRAYS))
    second = {name: array for number, (name, array) in enumerate(ARRAYS.items()) if number % 3 == 1}
    shard(sharded, 2).write_bytes(encode_safetensors({**second, twice: ARRAYS[twice]}))
    refused(sharded, SourceCorruptError, f"{twice} is in both model-00001-of-00003.safetensors and model-00002")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "sub/model.safetensors", "model.bin", "", None, 5],
)
def test_read_index_that_names_no_file_of_the_folder_is_refused(sharded: Path, name: Any) -> None:
    (sharded.parent / WEIGHTS).write_bytes(encode_safetensors(ARRAYS))
    change_json(sharded / huggingface.INDEX, weight_map={"model.norm.weight": name})
    refused(sharded, SourceCorruptError, "is not a weights file of this folder")


def test_read_index_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    listed = json.loads((sharded / huggingface.INDEX).read_text())["weight_map"]
    change_json(sharded / huggingface.INDEX, weight_map={**listed, "model.extra": shard(sharded, 1).name})
    refused(sharded, SourceCorruptError, "lists model.extra in model-00001-of-00003.safetensors, which does not hold it")


def test_read_index_tensor_in_another_shard_than_listed_is_refused(sharded: Path) -> None:
    listed = json.loads((sharded / huggingface.INDEX).read_text())["weight_map"]
    swapped = {**listed, next(iter(listed)): shard(sharded, 2).name}
    change_json(sharded / huggingface.INDEX, weight_map=swapped)
    refused(sharded, SourceCorruptError, "which does not hold it")


@pytest.mark.parametrize("text", ["[]", "5", "{", '{"weight_map": {}}', '{"weight_map": []}', "{}"])
def test_read_index_damaged_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / huggingface.INDEX).write_text(text)
    refused(sharded, SourceCorruptError, "index.json")


def test_read_index_with_lists_for_names_is_refused(sharded: Path) -> None:
    change_json(sharded / huggingface.INDEX, weight_map={"model.norm.weight": ["model.safetensors"]})
    refused(sharded, SourceCorruptError, "index.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_read_index_damaged_config_is_refused(single: Path, text: str) -> None:
    (single / "config.json").write_text(text)
    refused(single, SourceCorruptError, "config.json")


def test_read_index_of_a_plain_source_that_is_described_as_quantized_warns(single: Path) -> None:
    """As a cast of a quantized model leaves it, when config.json is copied."""
    change_json(single / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    (warning,) = huggingface.read_index(LocalFolder(single)).warnings
    assert "INT4 group 128 (AWQ), but no tensor is quantized" in warning


def test_identity_of_a_plain_file_is_its_time(single: Path) -> None:
    path = single / WEIGHTS
    before = huggingface.read_index(LocalFolder(single)).files[0]
    assert before.identity == f"mtime:{FIXED_TIME_NS}"
    os.utime(path, ns=(FIXED_TIME_NS, FIXED_TIME_NS + 1))
    assert huggingface.read_index(LocalFolder(single)).files[0].identity == f"mtime:{FIXED_TIME_NS + 1}"


def test_identity_of_a_hub_cache_link_is_its_blob_whenever_it_was_fetched(single: Path) -> None:
    blob = single.parent / "blobs" / ("0a" * 32)
    blob.parent.mkdir()
    (single / WEIGHTS).rename(blob)
    (single / WEIGHTS).symlink_to(Path("..", "blobs", blob.name))
    os.utime(blob, ns=(5, 5))
    (file,) = huggingface.read_index(LocalFolder(single)).files
    assert file.identity == f"sha256:{blob.name}"
    assert file.num_bytes == blob.stat().st_size


def test_identity_of_a_link_to_an_ordinary_file_is_its_time(single: Path) -> None:
    (single / WEIGHTS).rename(single.parent / "weights")
    (single / WEIGHTS).symlink_to(single.parent / "weights")
    assert huggingface.read_index(LocalFolder(single)).files[0].identity == f"mtime:{FIXED_TIME_NS}"


def test_companions_are_identified_by_content(single: Path) -> None:
    (single / "tokenizer.json").write_text("{}")
    (single / "README.md").write_text("not a companion")
    found = {file.name: file for file in companions(LocalFolder(single), LocalFolder(single).names())}
    assert set(found) == {"config.json", "tokenizer.json"}
    empty_object = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert found["tokenizer.json"].identity == f"sha256:{empty_object}"
    assert found["tokenizer.json"].num_bytes == 2


def read(source: FileSource, file: int, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    source.read_into(file, offset, memoryview(buffer))
    return bytes(buffer)


def test_file_source_reads_any_range_and_counts_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    (tmp_path / "b").write_bytes(bytes(range(100)))
    with FileSource(
        LocalFolder(tmp_path), (LocalFolder(tmp_path).source_file("a"), LocalFolder(tmp_path).source_file("b"))
    ) as source:
        assert read(source, 1, 90, 10) == bytes(range(90, 100))
        assert read(source, 0, 0, 10) == b"a" * 10
        assert read(source, 0, 10, 0) == b""
        assert source.bytes_read == 20


def test_file_source_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    with (
        FileSource(LocalFolder(tmp_path), (LocalFolder(tmp_path).source_file("a"),)) as source,
        pytest.raises(SourceCorruptError, match="ended at byte 10"),
    ):
        read(source, 0, 5, 6)


def test_file_source_of_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    planned = LocalFolder(tmp_path).source_file("a")
    os.utime(tmp_path / "a", ns=(1, 1))
    with (
        FileSource(LocalFolder(tmp_path), (planned,)) as source,
        pytest.raises(SourceCorruptError, match="not the file that the plan"),
    ):
        read(source, 0, 0, 1)


def test_file_source_missing_file_is_named(tmp_path: Path) -> None:
    with (
        FileSource(LocalFolder(tmp_path), (SourceFile("gone", 1, "mtime:1"),)) as source,
        pytest.raises(SourceMissingError, match="gone is missing on this node"),
    ):
        read(source, 0, 0, 1)


def test_file_source_closes_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with FileSource(LocalFolder(tmp_path), (LocalFolder(tmp_path).source_file("a"),)) as source:
        read(source, 0, 0, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_read_header_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones((3,), np.float16), "n": np.zeros((), np.int64)}
    path = tmp_path / WEIGHTS
    save_file(arrays, path, metadata={"format": "np"})
    entries, metadata = safetensors.read_header(path)
    data = path.read_bytes()
    assert metadata == {"format": "np"}
    assert {item.name: (item.shape, data[item.offset : item.offset + item.num_bytes]) for item in entries} == {
        name: (array.shape, array.tobytes()) for name, array in arrays.items()
    }


@pytest.mark.parametrize("family", TINY)
def test_config_of_a_tensorrt_llm_checkpoint_is_read_as_the_config_that_it_was_written_from(family: str) -> None:
    """TensorRT-LLM's config.json, and the Hugging Face config.json that a conversion back is planned from."""
    written = tiny_config(family)
    read, _ = from_trtllm(json.loads(json.dumps(to_trtllm(written, Topology(2, 1)))))
    assert read == written
    plain = hugging_face_config(read, FAMILIES[family])
    assert from_hugging_face(json.loads(json.dumps(plain)), read.architecture, read.dtype, FAMILIES[family].config) == written
