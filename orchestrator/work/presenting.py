"""A source of another format as the Hugging Face folder that transformers can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from orchestrator.checkpoints import COMPANIONS, format_named, read_source
from orchestrator.checkpoints.places import open_place
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.core.checkpoint import CheckpointIndex
from orchestrator.work.context import Context

_LOADABLE = {"huggingface", "bin"}
_BLOCK_BYTES = 16 * 2**20


def as_hugging_face(folder: Path, context: Context) -> Path:
    """`folder`, or a copy in scratch with the same tensors as safetensors. Raises the source's errors."""
    index, _ = read_source(str(folder))
    if index.format in _LOADABLE:
        return folder
    copy = context.scratch / "presented"
    copy.mkdir()
    context.log(f"reference: writes {index.num_bytes:,} bytes of {index.format} to scratch as safetensors")
    (copy / "config.json").write_text(json.dumps(_loadable_config(index)))
    _write_tensors(index, folder, copy / "model.safetensors", context)
    if (folder / "tokenizer.json").is_file():  # Meta's tokenizer.model alone is not one that transformers can load
        for name in COMPANIONS:
            if name != "config.json" and (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
    return copy


def _loadable_config(index: CheckpointIndex) -> dict[str, Any]:
    """The config with transformers' name of the model's type, which formats of other tools do not have."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    (architecture,) = index.config["architectures"]
    kinds = [kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
    return {"model_type": kinds[0] if kinds else "", **index.config}


def _write_tensors(index: CheckpointIndex, folder: Path, path: Path, context: Context) -> None:
    """Every tensor, read as conversion reads it, in blocks of rows."""
    read_rows = format_named(index.format).read_rows
    tensors = list(index.tensors.values())
    written = 0
    with open_place(str(folder)).open(index.files) as source, path.open("wb") as file:
        file.write(encode_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), {"format": "pt"}))
        for tensor in tensors:
            row_bytes = tensor.num_bytes // tensor.shape[0]
            step = max(1, _BLOCK_BYTES // row_bytes)
            for begin in range(0, tensor.shape[0], step):
                end = min(begin + step, tensor.shape[0])
                block = memoryview(bytearray((end - begin) * row_bytes))
                read_rows(source, tensor, begin, end, block)
                file.write(block)
                written += len(block)
                context.report("present", written, index.num_bytes, "bytes")
