"""Reader of Hugging Face folders without safetensors: config.json and pytorch_model.bin, a single file or shards with an index."""

from __future__ import annotations

from orchestrator.checkpoints.assembly import read_assembled_rows
from orchestrator.checkpoints.huggingface import read_shards
from orchestrator.checkpoints.torch_zip import read_tensors
from orchestrator.model.checkpoint import CheckpointIndex
from orchestrator.stores.source import SourceFolder

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"

read_rows = read_assembled_rows


def matches(names: list[str]) -> bool:
    """Whether config.json stands beside pytorch_model.bin or its index, without safetensors, which are preferred."""
    safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return "config.json" in names and not safetensors and (SINGLE in names or INDEX in names)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read the descriptions of the tensors in `folder`, without running pickled code.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, UnsafePickleError; QuantizationError for an unread quantization.
    """
    return read_shards(
        folder,
        "bin",
        INDEX,
        r"[^/\\]+\.bin",
        single=lambda _place, _present: SINGLE,
        read_entries=lambda name: read_tensors(folder, name),
    )
