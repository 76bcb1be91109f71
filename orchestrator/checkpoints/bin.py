"""Hugging Face folders of before safetensors: config.json and pytorch_model.bin, one file or shards under an index."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from orchestrator.checkpoints import read_contiguous_rows
from orchestrator.checkpoints.huggingface import check_file_names, read_config, read_json
from orchestrator.checkpoints.places import Place
from orchestrator.checkpoints.torch_zip import read_tensors
from orchestrator.core.checkpoint import CheckpointIndex, TensorInfo
from orchestrator.core.errors import SourceCorruptError, SourceMissingError

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
_FILE_THREADS = 8

read_rows = read_contiguous_rows


def matches(names: list[str]) -> bool:
    """A config.json beside pytorch_model.bin or its index, and no safetensors, which are preferred."""
    safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return "config.json" in names and not safetensors and (SINGLE in names or INDEX in names)


def read_index(place: Place) -> CheckpointIndex:
    """Read the descriptions of the tensors at `place`; nothing that is pickled is run.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, UnsafePickleError; QuantizationError for a source that is
    quantized.
    """
    present = place.names()
    config = read_config(place)
    listed = _listed(place, present)
    names = sorted(set(listed.values())) if listed else [SINGLE]
    for name in names:
        if name not in present:
            raise SourceMissingError(f"{place.url}/{name} is not there")
    with ThreadPoolExecutor(_FILE_THREADS) as pool:
        files = list(pool.map(lambda name: read_tensors(place, name), names))
    tensors: dict[str, TensorInfo] = {}
    for number, entries in enumerate(files):
        for entry in entries:
            if entry.name in tensors:
                other = names[tensors[entry.name].file]
                raise SourceCorruptError(f"{place.url}: {entry.name} is in both {other} and {names[number]}")
            tensors[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape, number, entry.offset, entry.num_bytes)
    for tensor, name in listed.items():
        if tensor not in tensors or names[tensors[tensor].file] != name:
            raise SourceCorruptError(f"{place.url}/{INDEX} says that {name} holds {tensor}, it does not")
    return CheckpointIndex("bin", tuple(place.source_file(name) for name in names), tensors, config)


def _listed(place: Place, present: list[str]) -> dict[str, str]:
    """Tensor to shard, from the index; empty when there is none."""
    if INDEX not in present:
        return {}
    listed = read_json(place, INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise SourceCorruptError(f"{place.url}/{INDEX} has no weight_map")
    check_file_names(list(listed.values()), r"[^/\\]+\.bin", f"{place.url}/{INDEX}")
    return listed
