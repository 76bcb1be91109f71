"""Folders that are no checkpoint, or half of one: each an error of the situation, none a traceback or a hang."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base.errors import (
    ArchitectureError,
    OrchestratorError,
    SourceCorruptError,
    SourceMissingError,
    SourceUnreadableError,
)
from orchestrator.checkpoints import read_source
from orchestrator.planning import preparation
from orchestrator.stores.source import MAX_WHOLE_BYTES
from tests.support.ordinary_user import ordinary_user
from tests.support.synthetic import build_spec, frame, model_config, random_arrays, write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = model_config()
    return write_source(tmp_path / "model", config, random_arrays(config), num_files=2)


def refused(source: Path, error: type[OrchestratorError], *words: str) -> None:
    with ordinary_user(), pytest.raises(error) as caught:
        preparation.plan(build_spec(source))
    for word in words:
        assert word in caught.value.message
    assert len(caught.value.message) < 600


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda path: path.chmod(0), SourceUnreadableError, "Permission denied"),
        (_replaced(os.mkfifo), SourceCorruptError, "is a pipe, not a file"),
        (_replaced(lambda path: path.symlink_to("/dev/zero")), SourceCorruptError, "is a device, not a file"),
        (_replaced(lambda path: path.symlink_to(path.name)), SourceUnreadableError, "Too many levels of symbolic links"),
        (
            _replaced(lambda path: path.symlink_to("../blobs/gone")),
            SourceMissingError,
            "is a link to ../blobs/gone, which is missing",
        ),
        (lambda path: path.write_bytes(b""), SourceCorruptError, ""),
    ],
    ids=["unreadable", "pipe", "device", "loop", "dangling", "empty"],
)
def test_plan_of_a_file_that_cannot_be_read_names_it(
    source: Path, name: str, change: Callable[[Path], None], error: type[OrchestratorError], words: str
) -> None:
    change(source / name)
    refused(source, error, name, words)


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o600])
def test_plan_of_a_folder_that_cannot_be_looked_into_says_so(source: Path, mode: int) -> None:
    source.chmod(mode)
    refused(source, SourceUnreadableError, "Permission denied")


def test_plan_of_a_file_instead_of_a_folder_names_the_folder(source: Path) -> None:
    with pytest.raises(SourceMissingError, match="is a file, not a folder") as caught:
        read_source(str(source / "config.json"))
    assert str(source) in caught.value.advice


def test_plan_of_a_config_of_a_terabyte_does_not_read_it(source: Path) -> None:
    with (source / "config.json").open("r+b") as file:
        file.truncate(MAX_WHOLE_BYTES + 1)
    refused(source, SourceCorruptError, "config.json", "no config or tokenizer is so large")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "is not JSON: maximum recursion depth"),
        (b'{"a":' * 50_000, "is not JSON: maximum recursion depth"),
        (b'{"a": "\\uD800"}', "half of a character"),
        (b"[1]", "is a JSON list, an object was expected"),
        (b"7", "is a JSON number"),
        (b"null", "is a JSON null"),
        (b"NaN", "is a JSON number"),
        (b'{"a": "\xff"}', "is not JSON: 'utf-8' codec"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "an object has two values of 'hidden_size'"),
        (b'{"' + b"x" * 10**6 + b'": 1, "' + b"x" * 10**6 + b'": 2}', "an object has two values of"),
    ],
)
def test_plan_of_a_config_that_is_no_json_object_says_what_it_is(source: Path, data: bytes, words: str) -> None:
    (source / "config.json").write_bytes(data)
    refused(source, SourceCorruptError, "config.json", words)


def test_plan_of_a_config_that_says_the_same_twice_goes_on(source: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"hidden_size": 16,', 1))
    assert preparation.plan(build_spec(source)).inputs.config.hidden_size == 16


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architectures": "LlamaForCausalLM"}, SourceCorruptError, "architectures is a JSON text, list was expected"),
        ({"architectures": {"a": 1}}, SourceCorruptError, "architectures is a JSON object"),
        ({"architectures": [7]}, SourceCorruptError, "an entry of architectures is not a text"),
        ({"architectures": [["LlamaForCausalLM"]]}, SourceCorruptError, "an entry of architectures"),
        ({"rope_parameters": 7}, SourceCorruptError, "rope_parameters is a JSON number"),
        ({"rope_scaling": "yarn"}, SourceCorruptError, "rope_scaling is a JSON text"),
        ({"layer_types": [1, 2, 3]}, SourceCorruptError, "an entry of layer_types"),
        ({"rope_parameters": {"rope_theta": [1]}}, ArchitectureError, ""),
        ({"hidden_size": float("nan")}, ArchitectureError, "hidden_size"),
        ({"num_hidden_layers": 2**40}, OrchestratorError, ""),
        ({"num_attention_heads": 2**40}, OrchestratorError, ""),
        ({"vocab_size": 10**300}, OrchestratorError, ""),
        ({"architectures": ["MixtralForCausalLM"]}, ArchitectureError, ""),
    ],
)
def test_plan_of_a_config_with_a_value_of_a_wrong_kind_names_it(
    source: Path, changes: dict[str, Any], error: type[OrchestratorError], words: str
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    refused(source, error, words)


ENTRY = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], "not a JSON object"),
        ({"a": 7}, "a has no dtype, shape and data_offsets"),
        ({"a": {**ENTRY, "dtype": ["BF16"]}}, "a has the unknown dtype ['BF16']"),
        ({"a": {**ENTRY, "dtype": "BF17"}}, "unknown dtype 'BF17'"),
        ({"a": {**ENTRY, "shape": [-1, -2]}}, "a has the malformed shape [-1, -2]"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "a has the malformed shape"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "a has the malformed shape"),
        ({"a": {**ENTRY, "shape": "22"}}, "a has the malformed shape"),
        ({"a": {**ENTRY, "shape": [1] * 100_000}}, "a has the malformed shape"),
        ({"a": {**ENTRY, "shape": [2**63, 0]}}, "a has the malformed shape"),
        ({"a": {**ENTRY, "data_offsets": [-4, 0]}}, "a has the malformed data_offsets [-4, 0]"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "a has the malformed data_offsets [0]"),
        ({"a": {**ENTRY, "data_offsets": ["0", "4"]}}, "a has the malformed data_offsets"),
        ({"a": {**ENTRY, "data_offsets": [4, 0]}}, "a: bytes 4..0 do not hold"),
        ({"a": {**ENTRY, "data_offsets": [4, 8]}}, "a starts at byte"),
        ({"\ud800": ENTRY}, "is not a text"),
        ({"a": ENTRY, "b": ENTRY}, "b starts at byte"),
        ({"a": ENTRY, "__metadata__": [1]}, "__metadata__ is not a JSON object"),
        ({"x" * 10**6: {**ENTRY, "shape": [3]}}, "do not hold"),
        ({"a": {**ENTRY, "shape": [2**62], "data_offsets": [0, 2**63 - 1]}}, "do not hold"),
    ],
)
def test_plan_of_a_hostile_safetensors_header_says_what_is_wrong_with_it(source: Path, header: Any, words: str) -> None:
    (source / "model-00001-of-00002.safetensors").write_bytes(frame(header, bytes(4)))
    refused(source, SourceCorruptError, "model-00001-of-00002.safetensors", words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}',
        "occurs twice"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b"\xff\xfe", "is damaged"),
        (b'{"a":{"dtype":"BF16","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', "Exceeds the limit"),
    ],
)  # fmt: skip
def test_plan_of_a_safetensors_header_that_is_no_json_says_so(source: Path, data: bytes, words: str) -> None:
    (source / "model-00001-of-00002.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    refused(source, SourceCorruptError, "model-00001-of-00002.safetensors", words)


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_plan_of_a_safetensors_header_of_a_wrong_length_says_so(source: Path, length: int) -> None:
    path = source / "model-00001-of-00002.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(source, SourceCorruptError, path.name)


@pytest.mark.parametrize(
    ("shard", "error"),
    [
        ("../model.safetensors", SourceCorruptError),
        ("/etc/passwd", SourceCorruptError),
        ("a/b.safetensors", SourceCorruptError),
        ("missing.safetensors", SourceMissingError),
        ("x" * 10**6 + ".safetensors", SourceMissingError),
        (7, SourceCorruptError),
        (["model-00001-of-00002.safetensors"], SourceCorruptError),
        (None, SourceCorruptError),
    ],
)
def test_plan_of_an_index_that_leads_elsewhere_is_refused(source: Path, shard: Any, error: type[OrchestratorError]) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index))
    refused(source, error, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "changes", [{"vocab_size": [1]}, {"rope_theta": "x"}, {"n_kv_heads": {"a": 1}}, {"hidden_dim": 1e300}, {"dim": True}]
)
def test_plan_of_metas_params_with_a_value_of_a_wrong_kind_names_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    from tests.support.meta import write_meta

    config = model_config()
    source = write_meta(tmp_path / "model", config, random_arrays(config))
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**params, **changes}))
    refused(source, SourceCorruptError, "params.json", next(iter(changes)))
