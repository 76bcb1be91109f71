"""Hugging Face folders of before safetensors: config.json and pytorch_model.bin, one file or shards under an index."""

from __future__ import annotations

from orchestrator.checkpoints.huggingface import read_shards
from orchestrator.checkpoints.rows import read_contiguous_rows
from orchestrator.checkpoints.torch_zip import read_tensors
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.stores.source import SourceFolder

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"

read_rows = read_contiguous_rows


def matches(names: list[str]) -> bool:
    """A config.json beside pytorch_model.bin or its index, and no safetensors, which are preferred."""
    safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return "config.json" in names and not safetensors and (SINGLE in names or INDEX in names)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read the descriptions of the tensors at `folder`; nothing that is pickled is run.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, UnsafePickleError; QuantizationError for a source that is
    quantized.
    """
    return read_shards(
        folder,
        "bin",
        INDEX,
        r"[^/\\]+\.bin",
        single=lambda _place, _present: SINGLE,
        read_entries=lambda name: read_tensors(folder, name),
    )
