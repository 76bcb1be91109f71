"""A source as a Hugging Face folder that transformers loads the very same tensors from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from orchestrator.checkpoints import COMPANIONS, format_named, huggingface, read_source
from orchestrator.checkpoints import bin as pytorch_bin
from orchestrator.checkpoints.places import open_place
from orchestrator.checkpoints.safetensors import encode_header
from orchestrator.core.checkpoint import CheckpointIndex
from orchestrator.work.context import Context

_INDEX_FILES = {"huggingface": huggingface.INDEX, "bin": pytorch_bin.INDEX}
"""Formats that transformers knows, and the index of each."""
_LOADED_FIRST = (huggingface.SINGLE, huggingface.INDEX, pytorch_bin.SINGLE, pytorch_bin.INDEX)
"""Of the files that are there, transformers loads the first of these (`_get_resolved_checkpoint_files`, transformers 5)."""
_BLOCK_BYTES = 16 * 2**20


def as_hugging_face(folder: Path, source_format: str, context: Context) -> Path:
    """`folder`, or a copy in scratch with the tensors of its `source_format` as safetensors. Raises the source's errors."""
    index, _ = read_source(str(folder), source_format)
    if _loads_the_same(index, folder):
        return folder
    copy = context.scratch / "presented"
    copy.mkdir()
    context.log(f"reference: writes {index.num_bytes:,} bytes of {index.format} to scratch as safetensors")
    (copy / "config.json").write_text(json.dumps(loadable_config(index)))
    _write_tensors(index, folder, copy / "model.safetensors", context)
    if index.format in _INDEX_FILES or (folder / "tokenizer.json").is_file():  # Meta's tokenizer.model alone cannot be loaded
        for name in COMPANIONS:
            if name != "config.json" and (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
    return copy


def _loads_the_same(index: CheckpointIndex, folder: Path) -> bool:
    """Whether transformers would take the weights that the index describes, and not another set beside them."""
    if index.format not in _INDEX_FILES:
        return False
    listing = _INDEX_FILES[index.format]
    described = listing if (folder / listing).is_file() else index.files[0].name
    return described == next((name for name in _LOADED_FIRST if (folder / name).is_file()), None)


def loadable_config(index: CheckpointIndex) -> dict[str, Any]:
    """The config with transformers' name of the model's type, which formats of other tools do not have."""
    if "model_type" in index.config:
        return dict(index.config)
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
