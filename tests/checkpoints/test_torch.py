"""torch.save files read as byte ranges: what is accepted lies where it says, what is not is refused before it runs."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import LfsPointerError, OrchestratorError, SourceCorruptError, SourceMissingError, UnsafePickleError
from orchestrator.checkpoints import bin as bin_format
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.torch_zip import read_tensors
from orchestrator.stores.source import LocalFolder
from tests.support.meta import write_bin
from tests.support.synthetic import model_config, random_arrays, write_source

CONFIG = model_config()
ARRAYS = random_arrays(CONFIG)
NAME = "weights.pth"


def save(folder: Path, value: Any, **options: Any) -> LocalFolder:
    torch.save(value, folder / NAME, **options)
    return LocalFolder(folder)


def refused(place: LocalFolder, error: type[OrchestratorError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        read_tensors(place, NAME)
    assert type(caught.value) is error


def stored(place: LocalFolder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = (place.folder / NAME).read_bytes()
    return {
        entry.name: (entry.dtype, entry.shape, data[entry.offset : entry.offset + entry.num_bytes])
        for entry in read_tensors(place, NAME)
    }


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32"), (torch.float64, "F64"), (torch.int64, "I64"),
     (torch.uint8, "U8"), (torch.bool, "BOOL")],
)  # fmt: skip
def test_read_tensors_every_dtype_points_at_its_bytes(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    tensor = torch.arange(15).reshape(3, 5).to(dtype)
    found = stored(save(tmp_path, {"a": tensor}))
    assert found == {"a": (name, (3, 5), tensor.view(torch.uint8).numpy().tobytes())}


def test_read_tensors_of_views_parameters_scalars_and_metadata(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32)
    state: OrderedDict[str, Any] = OrderedDict(
        whole=base, part=base[3:9].view(2, 3), parameter=torch.nn.Parameter(base.clone()), scalar=torch.tensor(5.0),
        empty=torch.empty(0, 4), column=base.view(12, 1), row=base[:4].view(4, 1).t(),
    )  # fmt: skip
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    found = stored(save(tmp_path, state))
    expected = {name: (tuple(value.shape), value.detach().numpy().tobytes()) for name, value in state.items()}
    assert {name: (shape, data) for name, (_, shape, data) in found.items()} == expected


@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6))
def test_read_tensors_any_shapes_equal_torch(tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]]) -> None:
    state = {f"{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    found = stored(save(tmp_path_factory.mktemp("any"), state))
    assert found == {name: ("F32", tuple(value.shape), value.numpy().tobytes()) for name, value in state.items()}


class Payload:
    """Creates a file when it is unpickled by the ordinary reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_read_tensors_of_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    place = save(tmp_path, {"a": torch.ones(2), "b": Payload(victim)})
    refused(place, UnsafePickleError, r"asks for (builtins|__builtin__)\.getattr")
    assert not victim.exists()
    torch.load(tmp_path / NAME, weights_only=False)
    assert victim.exists(), "the payload is live: only the reader kept it from running"


@pytest.mark.parametrize("name", ["os system", "builtins eval", "torch load", "torch._utils _rebuild_tensor", "copyreg add"])
def test_read_tensors_of_a_pickle_that_names_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    place = save(tmp_path, {"a": torch.ones(2)})
    replace_pickle(place, b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    refused(place, UnsafePickleError, name.replace(" ", r"\."))


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x02", id="ends-early"),
        pytest.param(b"\x80\x02K\x01.", id="a-number"),
        pytest.param(b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", id="a-number-as-tensor"),
        pytest.param(b"\x80\x02ctorch\nFloatStorage\n)R.", id="a-dtype-is-called"),
        pytest.param(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x01K\x01tR.", id="no-storage"),
        pytest.param(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", id="sets-an-attribute"),
    ],
)
def test_read_tensors_of_a_damaged_pickle_is_corrupt(tmp_path: Path, program: bytes) -> None:
    place = save(tmp_path, {"a": torch.ones(2)})
    replace_pickle(place, program)
    refused(place, SourceCorruptError, "data.pkl|not a")


def rewrite(place: LocalFolder, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again; a member for which `change` gives None is left out."""
    with zipfile.ZipFile(place.folder / NAME) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(place.folder / NAME, "w", compression) as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(name, data)


def replace_pickle(place: LocalFolder, program: bytes) -> None:
    rewrite(place, lambda name, data: program if name.endswith("data.pkl") else data)


def test_read_tensors_of_a_rewritten_archive_without_padding(tmp_path: Path) -> None:
    tensor = torch.randn(5, 7)
    place = save(tmp_path, {"a": tensor})
    rewrite(place, lambda name, data: data)
    assert stored(place)["a"][2] == tensor.numpy().tobytes()


def test_read_tensors_of_a_compressed_storage_is_corrupt(tmp_path: Path) -> None:
    place = save(tmp_path, {"a": torch.zeros(1000)})
    rewrite(place, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(place, SourceCorruptError, "compressed")


def test_read_tensors_of_a_missing_or_short_storage_is_corrupt(tmp_path: Path) -> None:
    place = save(tmp_path, {"a": torch.zeros(8)})
    rewrite(place, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    refused(place, SourceCorruptError, "28 bytes for 8 elements")
    rewrite(place, lambda name, data: None if name.endswith("data/0") else data)
    refused(place, SourceCorruptError, "lacks the storage 0")


def test_read_tensors_of_big_endian_bytes_is_corrupt(tmp_path: Path) -> None:
    place = save(tmp_path, {"a": torch.zeros(8)})
    rewrite(place, lambda name, data: b"big" if name.endswith("byteorder") else data)
    refused(place, SourceCorruptError, "big-endian")


def test_read_tensors_of_a_transposed_tensor_is_corrupt(tmp_path: Path) -> None:
    refused(save(tmp_path, {"a": torch.randn(3, 4).t()}), SourceCorruptError, "a is not contiguous")


def test_read_tensors_of_the_legacy_format_is_refused(tmp_path: Path) -> None:
    place = save(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    refused(place, UnsafePickleError, "before 1.6")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_read_tensors_of_a_truncated_archive_is_corrupt(tmp_path: Path, keep: float) -> None:
    place = save(tmp_path, {"a": torch.randn(1000)})
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data[: int(len(data) * keep)])
    refused(place, SourceCorruptError, "truncated or damaged")


@given(position=st.integers(0, 5000), value=st.integers(0, 255))
def test_read_tensors_of_a_changed_byte_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    place = save(tmp_path_factory.mktemp("changed"), {"a": torch.ones(20), "b": torch.nn.Parameter(torch.ones(3, 4))})
    data = bytearray((place.folder / NAME).read_bytes())
    data[position % len(data)] = value
    (place.folder / NAME).write_bytes(data)
    try:
        entries = read_tensors(place, NAME)
    except (SourceCorruptError, UnsafePickleError, LfsPointerError):
        return
    assert all(entry.offset >= 0 and entry.offset + entry.num_bytes <= len(data) for entry in entries)


def test_read_tensors_of_something_else_says_so(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(LocalFolder(tmp_path), LfsPointerError, "Git-LFS")
    (tmp_path / NAME).write_bytes(b"no weights at all")
    refused(LocalFolder(tmp_path), SourceCorruptError, "not a file of torch.save")
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr("readme", "no weights")
    refused(LocalFolder(tmp_path), SourceCorruptError, "without one data.pkl")
    (tmp_path / NAME).write_bytes(pickle.dumps({"a": 1}))
    refused(LocalFolder(tmp_path), UnsafePickleError, "bare pickle")


@pytest.mark.parametrize("num_files", [1, 3])
def test_bin_index_equals_that_of_safetensors(tmp_path: Path, num_files: int) -> None:
    folder = write_bin(tmp_path / "bin", CONFIG, ARRAYS, num_files)
    index, companions = read_source(str(folder))
    expected, _ = read_source(str(write_source(tmp_path / "safetensors", CONFIG, ARRAYS, num_files)))
    assert (index.format, expected.format) == ("bin", "huggingface")
    assert index.config == expected.config
    assert [file.name for file in companions] == ["config.json"]
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items()}
    assert described == {name: (tensor.dtype, tensor.shape) for name, tensor in expected.tensors.items()}
    with LocalFolder(folder).open(index.files) as source:
        for name, tensor in index.tensors.items():
            out = np.empty(tensor.num_bytes, np.uint8)
            bin_format.read_rows(source, tensor, 0, tensor.shape[0], out.data)
            assert out.view(ml_dtypes.bfloat16).reshape(tensor.shape).tobytes() == ARRAYS[name].tobytes()


def test_bin_beside_safetensors_is_not_read(tmp_path: Path) -> None:
    folder = write_bin(tmp_path, CONFIG, ARRAYS)
    write_source(folder, CONFIG, ARRAYS)
    assert read_source(str(folder))[0].format == "huggingface"


def test_bin_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = write_bin(tmp_path, CONFIG, ARRAYS, num_files=2)
    index = folder / "pytorch_model.bin.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(listed.values()))
    first = next(iter(listed))
    index.write_text(json.dumps({"weight_map": {**listed, first: shards[listed[first] == shards[0]]}}))
    with pytest.raises(SourceCorruptError, match="which does not hold it"):
        bin_format.read_index(LocalFolder(folder))
    index.write_text(json.dumps({"weight_map": {**listed, "more": "absent.bin"}}))
    with pytest.raises(SourceMissingError, match=r"absent\.bin"):
        bin_format.read_index(LocalFolder(folder))
    index.write_text(json.dumps({"weight_map": {**listed, "more": "../absent.bin"}}))
    with pytest.raises(SourceCorruptError, match="not a weights file"):
        bin_format.read_index(LocalFolder(folder))
