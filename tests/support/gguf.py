"""GGUF files of the llama architecture, written with the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as library
import numpy as np

from orchestrator.checkpoints import gguf
from orchestrator.model.config import ModelConfig
from tests.support.meta import interleave
from tests.support.synthetic import Array

_INNER = {value: key for key, value in gguf._LAYER.items()}
_TOP = {value: key for key, value in gguf._TOP.items()}


def write_gguf(folder: Path, config: ModelConfig, arrays: dict[str, Array], kind: str, **fields: Any) -> dict[str, Array]:
    """Write model.gguf with matrices of `kind`; returns the tensors as a reader must give them back."""
    folder.mkdir(exist_ok=True)
    writer = library.GGUFWriter(folder / "model.gguf", fields.pop("architecture", "llama"))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rotary_base)
    for name, tensor in fields.items():
        writer.add_tensor(name.replace("__", "."), tensor)
    expected = {}
    for name, array in arrays.items():
        wanted = library.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        packed = library.quants.quantize(array, wanted)
        expected[name] = library.quants.dequantize(packed, wanted).astype(np.float32).reshape(array.shape)
        stored = interleave(packed, config.head_size) if name.endswith(("q_proj.weight", "k_proj.weight")) else packed
        writer.add_tensor(_name(name), stored, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_INNER[inner]}.weight"
