"""Checkpoints that megatron-core wrote, presented as Hugging Face's tensors: every family, every cut, and what is refused."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import (
    ArchitectureError,
    OrchestratorError,
    QuantizationError,
    SourceCorruptError,
    SourceMissingError,
    UnsafePickleError,
)
from orchestrator.checkpoints import format_named, read_source
from orchestrator.checkpoints.torch_dist import read_metadata
from orchestrator.checkpoints.torch_zip import TensorArchives
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.stores.source import LocalFolder
from tests.support.megatron import TOKENS
from tests.support.megatron_fixtures import MODELS, NAMES, unpack, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Hugging Face folder of a model of MODELS."""
    root = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        folder = root / name
        return folder if folder.is_dir() else write_model(name, folder)

    return made


def read(folder: Path, index: CheckpointIndex, name: str, begin: int = 0, end: int | None = None) -> tuple[bytes, int]:
    """Rows of a tensor, and how many bytes were read for them."""
    tensor = index.tensors[name]
    end = tensor.shape[0] if end is None else end
    out = np.full((end - begin) * (tensor.num_bytes // tensor.shape[0]), 0xEE, np.uint8)
    with LocalFolder(folder).open(index.files) as source:
        format_named(index.format).read_rows(source, tensor, begin, end, out.data)
        return out.tobytes(), source.bytes_read


@pytest.mark.parametrize("name", NAMES)
def test_megatron_presents_the_tensors_of_hugging_face(tmp_path: Path, models: Callable[[str], Path], name: str) -> None:
    folder, source = unpack(name, tmp_path), models(name.partition("-")[0])
    index, expected = read_source(str(folder))[0], read_source(str(source))[0]
    assert index.format == "megatron"
    assert index.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert (index.tensors[key].dtype, index.tensors[key].shape) == (tensor.dtype, tensor.shape), key
        found, num_read = read(folder, index, key)
        assert found == read(source, expected, key)[0], key
        assert num_read == tensor.num_bytes, key
    assert index.config["vocab_size"] == 67  # and the rows of padding after it are not read


@pytest.mark.parametrize("name", MODELS)
def test_megatron_config_makes_transformers_compute_what_megatron_core_computes(
    tmp_path: Path, models: Callable[[str], Path], name: str
) -> None:
    import torch
    import transformers

    folder = unpack(name, tmp_path)
    config = transformers.AutoConfig.for_model(**read_source(str(folder))[0].config)
    model = transformers.AutoModelForCausalLM.from_pretrained(models(name), config=config, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits[0].numpy()
    expected = np.load(folder / "logits.npy")
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointIndex, dict[str, bytes]]:
    """Folder, index and whole tensors of a mixture."""
    folder = unpack("mixtral-tp2-pp2", tmp_path_factory.mktemp("mixture"))
    index = read_source(str(folder))[0]
    return folder, index, {name: read(folder, index, name)[0] for name in index.tensors}


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_megatron_any_row_range_reads_its_bytes_once(
    mixture: tuple[Path, CheckpointIndex, dict[str, bytes]], data: st.DataObject
) -> None:
    folder, index, whole = mixture
    name = data.draw(st.sampled_from(sorted(index.tensors)))
    rows = index.tensors[name].shape[0]
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    row = len(whole[name]) // rows
    assert read(folder, index, name, begin, end) == (whole[name][begin * row : end * row], (end - begin) * row)


def refused(folder: Path, error: type[OrchestratorError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_source(str(folder))
    assert type(caught.value) is error


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_megatron_metadata_with_code_in_it_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    unpack("llama", tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"state": Evil()}, protocol))
    refused(tmp_path, UnsafePickleError, r"\.metadata asks for (__builtin__|builtins)\.exec")


@pytest.mark.parametrize("name", ["os.system", "torch.load", "torch.float32.__class__", "torch._utils._rebuild_tensor_v2"])
def test_megatron_metadata_that_names_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    module, _, inner = name.partition(".") if name.count(".") < 3 and not name.startswith("torch._") else name.rpartition(".")
    unpack("llama", tmp_path)
    text = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, inner)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(text)
    refused(tmp_path, UnsafePickleError, "which no description of tensors needs")


def test_megatron_shard_that_is_truncated_missing_or_foreign_is_refused(tmp_path: Path) -> None:
    unpack("llama-tp2-pp2", tmp_path)
    shard = tmp_path / "__1_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    refused(tmp_path, SourceCorruptError, r"__1_0\.distcp is truncated: \d+ bytes, \S+ ends at \d+")
    shard.write_bytes(content.replace(b"PK\x03\x04", b"PK\x03\x05"))
    refused(tmp_path, SourceCorruptError, r"__1_0\.distcp at byte \d+")
    shard.unlink()
    refused(tmp_path, SourceMissingError, r"\.metadata names __1_0\.distcp, which is missing")


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the objects of .metadata as torch reads and writes them."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # our own fixture
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


NORM = "decoder.final_layernorm.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8", "complex64"])
def test_megatron_dtype_that_torch_knows_and_we_do_not_is_refused(tmp_path: Path, dtype: str) -> None:
    import torch

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[NORM].properties.dtype = getattr(torch, dtype)

    unpack("llama", tmp_path)
    change_metadata(tmp_path, change)
    refused(tmp_path, QuantizationError, f"{NORM} is stored as {dtype}, which is no dtype of weights")


def _drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[FC1].chunks.pop()


def _repeat_chunk(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[FC1].chunks
    chunks[1] = chunks[0]


def _move_out(metadata: Any) -> None:
    metadata.state_dict_metadata[FC1].chunks[0].sizes = metadata.state_dict_metadata[FC1].size


def _drop_place(metadata: Any) -> None:
    del metadata.storage_data[next(key for key in metadata.storage_data if key.fqn == FC1)]


def _leave_folder(metadata: Any) -> None:
    next(info for key, info in metadata.storage_data.items() if key.fqn == NORM).relative_path = "../__0_0.distcp"


def _compress(metadata: Any) -> None:
    next(info for key, info in metadata.storage_data.items() if key.fqn == NORM).transform_descriptors = ["zstd"]


def _swap_places(metadata: Any) -> None:
    norm, fused = (next(info for key, info in metadata.storage_data.items() if key.fqn == name) for name in (NORM, FC1))
    norm.offset, norm.length, norm.relative_path = fused.offset, fused.length, fused.relative_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop_chunk, f"chunks of {FC1} do not make up its shape"),
        (_repeat_chunk, f"chunks of {FC1} do not make up its shape"),
        (_move_out, f"a chunk of {FC1} lies outside of it|do not make up"),
        (_drop_place, f"of {FC1} has no place in a file"),
        (_leave_folder, r"is not a \.distcp file of this folder"),
        (_compress, f"{NORM} was written through transforms"),
        (_swap_places, rf"the chunk of {NORM} at byte \d+ is BF16 \[1, 24, 32\], \.metadata says bfloat16 \[32\]"),
    ],
)
def test_megatron_metadata_that_contradicts_itself_is_refused(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    unpack("llama-tp2-pp2", tmp_path)
    change_metadata(tmp_path, change)
    refused(tmp_path, SourceCorruptError, words)


def test_megatron_metadata_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    unpack("llama", tmp_path)
    content = (tmp_path / ".metadata").read_bytes()
    for size in range(0, len(content), len(content) // 50):
        (tmp_path / ".metadata").write_bytes(content[:size])
        refused(tmp_path, SourceCorruptError, r"\.metadata is damaged")


def test_megatron_optimizer_states_are_left_out(tmp_path: Path) -> None:
    def add(metadata: Any) -> None:
        import copy

        stored = copy.deepcopy(metadata.state_dict_metadata[NORM])
        metadata.state_dict_metadata[f"optimizer.state.exp_avg.{NORM}"] = stored
        metadata.state_dict_metadata[f"chained_0.optimizer.state.exp_avg_sq.{NORM}"] = stored
        for key, info in list(metadata.storage_data.items()):
            if key.fqn == NORM:
                for name in list(metadata.state_dict_metadata)[-2:]:
                    metadata.storage_data[type(key)(name, key.offset)] = info

        metadata.storage_meta.checkpoint_id = Path("/of/the/trainer")

    expected = read_source(str(unpack("llama", tmp_path)))[0]
    change_metadata(tmp_path, add)
    assert len(read_metadata(LocalFolder(tmp_path), ".metadata")) > len(expected.tensors) / 3
    assert read_source(str(tmp_path))[0].tensors.keys() == expected.tensors.keys()


def with_config(folder: Path, **changes: Any) -> None:
    path = folder / "run_config.yaml"
    document = yaml.safe_load(path.read_text())
    document["model"].update(changes)
    path.write_text(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"normalization": "LayerNorm"}, ArchitectureError, "normalization is 'LayerNorm'"),
        ({"add_bias_linear": True}, ArchitectureError, "add_bias_linear is True"),
        ({"position_embedding_type": "learned_absolute"}, ArchitectureError, "position_embedding_type is"),
        ({"rotary_percent": 0.5}, ArchitectureError, "rotary_percent is 0.5"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, ArchitectureError, "gelu"),
        ({"moe_layer_freq": [0, 1, 1]}, ArchitectureError, "moe_layer_freq"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, ArchitectureError, "no family has both"),
        ({"num_layers": None}, SourceCorruptError, "num_layers is None"),
        ({"num_layers": 4}, SourceCorruptError, "the config says 4 layers"),
        ({"num_attention_heads": "8"}, SourceCorruptError, "num_attention_heads is '8'"),
        ({"num_query_groups": 3}, SourceCorruptError, "3 query groups do not divide"),
        ({"num_query_groups": 1}, SourceCorruptError, "has 64 rows, 1 query groups of"),
        ({"hidden_size": 2**60}, SourceCorruptError, "not a number of a model"),
    ],
)
def test_megatron_config_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[OrchestratorError], words: str
) -> None:
    with_config(unpack("llama", tmp_path), **changes)
    refused(tmp_path, error, words)


@pytest.mark.parametrize("key", ["window_size", "softmax_scale", "attention_output_gate", "mtp_num_layers", "a_new_key"])
def test_megatron_key_that_changes_the_model_reaches_the_family_which_refuses_it(tmp_path: Path, key: str) -> None:
    with_config(unpack("llama", tmp_path), **{key: 2, "another_new_key": False})
    from orchestrator.planning import preparation
    from tests.support.synthetic import build_spec

    with pytest.raises(ArchitectureError, match=f"does not know: '{key}'"):
        preparation.plan(build_spec(tmp_path, dtype="bfloat16"))
    spec = build_spec(tmp_path, dtype="bfloat16")
    ignoring = spec.model_copy(update={"source": spec.source.model_copy(update={"ignored_keys": (key,)})})
    assert preparation.plan(ignoring).inputs.config.architecture == "LlamaForCausalLM"


def test_megatron_folders_that_lack_a_part_say_what_to_do(tmp_path: Path) -> None:
    run = tmp_path / "run"
    unpack("llama", run / "iter_0000010")
    shutil.copytree(run / "iter_0000010", run / "iter_0000020")
    with pytest.raises(SourceMissingError, match="holds 2 iterations of a run") as caught:
        read_source(str(run))
    assert caught.value.advice == f"Give one: {run}/iter_0000020."
    (run / "iter_0000010" / "run_config.yaml").unlink()
    refused(run / "iter_0000010", SourceMissingError, r"run_config\.yaml is missing")
    archive = tmp_path / "model.nemo"
    archive.write_bytes(b"")
    with pytest.raises(SourceMissingError, match="is an archive of NeMo 1"):
        read_source(str(archive))


def test_megatron_tokenizer_stands_where_the_trainer_keeps_it(tmp_path: Path) -> None:
    for name, place in (("llama", "tokenizer"), ("llama-nemo", "context/nemo_tokenizer")):
        folder = unpack(name, tmp_path / name)
        (folder / place).mkdir()
        (folder / place / "tokenizer.json").write_text("{}")
        assert [file.name for file in read_source(str(folder))[1]] == [f"{place}/tokenizer.json"]


def test_megatron_chunk_that_begins_unlike_its_like_is_read_whole(tmp_path: Path) -> None:
    """The second of two chunks of one shape claims to be float16: its pickle differs by a word, its size does not."""
    expected = read_source(str(unpack("llama", tmp_path)))[0]
    last = expected.tensors["model.layers.2.self_attn.o_proj.weight"]
    piece = last.assembly.pieces[0] if last.assembly else None
    assert piece is not None
    shard = tmp_path / expected.files[piece.file].name
    data = bytearray(shard.read_bytes())
    at = data.rindex(b"BFloat16Storage", 0, piece.offset)
    data[at : at + 15] = b"  ShortStorage "
    shard.write_bytes(data)
    with pytest.raises(OrchestratorError):
        read_source(str(tmp_path))


def test_torch_archives_of_one_kind_cost_one_read_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reads, original = LocalFolder(unpack("llama", tmp_path)), [], LocalFolder.read

    def counted(self: LocalFolder, name: str, begin: int = 0, end: int | None = None) -> bytes:
        reads.append(name)
        return original(self, name, begin, end)

    chunks = read_metadata(folder, ".metadata")["decoder.layers.self_attention.linear_qkv.weight"].chunks
    alone = [TensorArchives(folder).read(chunk.file, chunk.offset, chunk.num_bytes) for chunk in chunks]
    monkeypatch.setattr(LocalFolder, "read", counted)
    archives = TensorArchives(folder)
    assert [archives.read(chunk.file, chunk.offset, chunk.num_bytes) for chunk in chunks] == alone
    assert len(reads) == len(chunks) + 1
