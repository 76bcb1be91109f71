"""Hugging Face folders: config.json and safetensors, one file or shards under an index. Headers only."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.blocks import source_file
from orchestrator.checkpoints.safetensors import HeaderEntry, read_header
from orchestrator.core.checkpoint import CheckpointIndex, SourceFile, TensorInfo
from orchestrator.core.digest import digest_bytes
from orchestrator.core.errors import LfsPointerError, QuantizationError, SourceCorruptError, SourceMissingError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files beside the weights that a server of the model needs."""
_HEADER_THREADS = 8


def read_index(folder: Path) -> CheckpointIndex:
    """Read the headers of the checkpoint in `folder`.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError; QuantizationError for a source that is quantized.
    """
    if not folder.is_dir():
        raise SourceMissingError(f"there is no folder {folder}", "Check source.path in the spec.")
    config = _read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise QuantizationError(f"{folder} is already quantized ({method})", "Build from the unquantized checkpoint.")
    listed = _listed(folder)
    names = sorted(set(listed.values())) if listed else [_single_file(folder)]
    for name in names:
        if not (folder / name).is_file():
            raise SourceMissingError(f"{folder / INDEX} names the shard {name}, which is not there")
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        headers = list(pool.map(lambda name: read_header(folder / name)[0], names))
    tensors = _collect(folder, names, headers)
    for tensor, name in listed.items():
        if tensor not in tensors or names[tensors[tensor].file] != name:
            raise SourceCorruptError(f"{folder / INDEX} says that {name} holds {tensor}, it does not")
    files = tuple(source_file(folder, name) for name in names)
    return CheckpointIndex("huggingface", files, tensors, config)


def companions(folder: Path) -> tuple[SourceFile, ...]:
    """The tokenizer and config files that are there, identified by their content."""
    found = []
    for name in COMPANIONS:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            found.append(SourceFile(name, len(data), "sha256:" + digest_bytes(data)))
    return tuple(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SourceMissingError(f"{path} is not there", "A Hugging Face checkpoint is a folder with config.json.") from None
    except ValueError as error:
        if path.read_bytes().startswith(b"version https://git-lfs"):
            raise LfsPointerError(f"{path} is a Git-LFS pointer") from None
        raise SourceCorruptError(f"{path} is not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise SourceCorruptError(f"{path} is not a JSON object")
    return plain


def _listed(folder: Path) -> dict[str, str]:
    """Tensor to shard, from the index; empty when there is none."""
    if not (folder / INDEX).is_file():
        return {}
    listed = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise SourceCorruptError(f"{folder / INDEX} has no weight_map")
    for name in listed.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise SourceCorruptError(f"{folder / INDEX} names {name!r}, which is not a safetensors file of this folder")
    return listed


def _single_file(folder: Path) -> str:
    if (folder / SINGLE).is_file():
        return SINGLE
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        raise SourceMissingError(f"{folder} has {len(others)} safetensors files but no {INDEX}")
    raise SourceMissingError(f"{folder} has no safetensors weights", "Convert .bin or .pth weights to safetensors first.")


def _collect(folder: Path, names: list[str], headers: list[list[HeaderEntry]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for number, entries in enumerate(headers):
        for entry in entries:
            if entry.name in tensors:
                other = names[tensors[entry.name].file]
                raise SourceCorruptError(f"{folder}: {entry.name} is in both {other} and {names[number]}")
            tensors[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape, number, entry.offset, entry.num_bytes)
    return tensors
