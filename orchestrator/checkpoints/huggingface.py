"""Reader of Hugging Face folders: config.json and safetensors, a single file or shards with an index. Headers only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.base.errors import LfsPointerError, SourceCorruptError, SourceMissingError, abbreviated
from orchestrator.checkpoints.assembly import read_assembled_rows
from orchestrator.checkpoints.json_text import json_value
from orchestrator.checkpoints.parts import language_model
from orchestrator.checkpoints.quantized import with_encodings
from orchestrator.checkpoints.quantized.methods import Described, described, mark_of
from orchestrator.checkpoints.safetensors import HeaderEntry, read_header_at
from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.stores.source import LFS_MAGIC, SourceFolder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_THREADS = 8

read_rows = read_assembled_rows


def matches(names: list[str]) -> bool:
    """Whether there is a config.json, and no rank files of TensorRT-LLM."""
    return "config.json" in names and not any(re.fullmatch(r"rank\d+(-.*)?\.safetensors", name) for name in names)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read the headers of the checkpoint in `folder`.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError; QuantizationError for a quantization that is not read.
    """
    return read_shards(
        folder,
        "huggingface",
        INDEX,
        r"[^/\\]+\.safetensors",
        single=_single_file,
        read_entries=lambda name: read_header_at(folder, name)[0],
    )


def read_shards(
    folder: SourceFolder,
    source_format: str,
    index: str,
    pattern: str,
    *,
    single: Callable[[SourceFolder, list[str]], str],
    read_entries: Callable[[str], Sequence[HeaderEntry]],
) -> CheckpointIndex:
    """Return the index of a folder with config.json and weights in a single file, or in shards that the file `index` lists.

    Names of shards must match `pattern`. `single` returns the name of the single file, `read_entries` the tensors of a file.
    Raises SourceMissingError, SourceCorruptError, QuantizationError, and what `read_entries` raises.
    """
    present = folder.names()
    config = read_config(folder)
    listed = _listed(folder, present, index, pattern)
    names = sorted(set(listed.values())) if listed else [single(folder, present)]
    for name in names:
        if name not in present:
            raise SourceMissingError(f"{folder.url}/{index} names the shard {abbreviated(name, 100)}, which is missing")
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        described = list(pool.map(read_entries, names))
    tensors = _collect(folder, names, described)
    for tensor, name in listed.items():
        if tensor not in tensors or names[tensors[tensor].file] != name:
            raise SourceCorruptError(f"{folder.url}/{index} lists {tensor} in {name}, which does not hold it")
    found = CheckpointIndex(source_format, tuple(folder.source_file(name) for name in names), tensors, config)
    return language_model(with_encodings(found, _described(folder, config, present), folder.url))


def _described(folder: SourceFolder, config: dict[str, Any], present: list[str]) -> Described | None:
    """Return the folder's description of its quantization; None: none. Raises QuantizationError, SourceCorruptError."""
    mark = mark_of(present)
    nested = config.get("text_config") or {}
    config = config if config.get("quantization_config") else {**nested, **config}
    return described(folder.url, config, mark, read_json(folder, mark) if mark else {})


def read_config(folder: SourceFolder) -> dict[str, Any]:
    """Read config.json. Raises SourceMissingError, SourceCorruptError."""
    try:
        config = read_json(folder, "config.json")
    except SourceMissingError as error:
        raise SourceMissingError(error.message, "A Hugging Face checkpoint is a folder with config.json.") from None
    _check_kinds(config, f"{folder.url}/config.json")
    return config


_KINDS: dict[str, type] = {
    "architectures": list, "model_type": str, "rope_scaling": dict, "rope_parameters": dict, "layer_types": list,
    "text_config": dict,
}  # fmt: skip
"""Keys of config.json that are read before the family is known -> type."""


def _check_kinds(config: dict[str, Any], where: str) -> None:
    """Check the types of _KINDS. Raises SourceCorruptError."""
    for key, kind in _KINDS.items():
        value: Any = config.get(key)
        if value is not None and not isinstance(value, kind):
            raise SourceCorruptError(f"{where}: {key} is a JSON {_kind(value)}, {_kind(kind())} was expected", _COMPLETE)
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise SourceCorruptError(f"{where}: an entry of {key} is not a text", _COMPLETE)


def _kind(value: object) -> str:
    """Return JSON's name of a value's type."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def read_json(folder: SourceFolder, name: str) -> dict[str, Any]:
    """Read a JSON object of the source. Raises SourceMissingError, LfsPointerError, SourceCorruptError."""
    return parse_json(folder.read(name), f"{folder.url}/{name}")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object in `data`, a file of the source. Raises LfsPointerError, SourceCorruptError."""
    if data.startswith(LFS_MAGIC):
        raise LfsPointerError(f"{where} is a Git-LFS pointer")
    plain = json_value(data, where)
    if not isinstance(plain, dict):
        raise SourceCorruptError(f"{where} is a JSON {_kind(plain)}, an object was expected")
    return plain


_COMPLETE = "Use the config.json of the model's publisher."


def check_file_names(names: list[Any], pattern: str, where: str) -> None:
    """Refuse file names of an index that could lead outside of the folder. Raises SourceCorruptError."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(pattern, name):
            raise SourceCorruptError(f"{where} names {abbreviated(repr(name), 100)}, which is not a weights file of this folder")


def _listed(folder: SourceFolder, present: list[str], index: str, pattern: str) -> dict[str, str]:
    """Read the index: tensor -> shard; empty: there is no index."""
    if index not in present:
        return {}
    listed = read_json(folder, index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise SourceCorruptError(f"{folder.url}/{index} has no weight_map")
    check_file_names(list(listed.values()), pattern, f"{folder.url}/{index}")
    return listed


def _single_file(folder: SourceFolder, present: list[str]) -> str:
    if SINGLE in present:
        return SINGLE
    others = [name for name in present if name.endswith(".safetensors") and "/" not in name]
    if len(others) == 1:
        return others[0]
    if others:
        raise SourceMissingError(f"{folder.url} has {len(others)} safetensors files but no {INDEX}")
    raise SourceMissingError(f"{folder.url} has no safetensors weights", "Convert the weights to safetensors first.")


def _collect(folder: SourceFolder, names: list[str], described: Sequence[Sequence[HeaderEntry]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for number, entries in enumerate(described):
        for entry in entries:
            if entry.name in tensors:
                other = names[tensors[entry.name].file]
                raise SourceCorruptError(f"{folder.url}: {entry.name} is in both {other} and {names[number]}")
            tensors[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape, number, entry.offset, entry.num_bytes)
    return tensors
