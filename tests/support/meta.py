"""Meta's checkpoint folders, written from Hugging Face's tensors with torch.save: the way back of the reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.model.config import ModelConfig
from tests.support.synthetic import Array, hugging_face_config

_NAMES = {
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0), "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1), "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}  # fmt: skip


def to_torch(array: Array) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def write_bin(folder: Path, config: ModelConfig, arrays: Mapping[str, Array], num_files: int = 1) -> Path:
    """A Hugging Face folder with pytorch_model.bin, or shards under an index."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    tensors = {name: torch.nn.Parameter(to_torch(array)) for name, array in arrays.items()}
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    listed = {name: f"pytorch_model-{number % num_files + 1:05d}-of-{num_files:05d}.bin" for number, name in enumerate(arrays)}
    for shard in set(listed.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if listed[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def interleave(array: Array, head_size: int) -> Array:
    """Rows of each head from halves to neighbours, by the definition: Meta's rows 2i and 2i + 1 are i and half + i."""
    result = array.copy()
    half = head_size // 2
    for head in range(0, len(array), head_size):
        for row in range(half):
            result[head + 2 * row] = array[head + row]
            result[head + 2 * row + 1] = array[head + half + row]
    return result


def write_meta(folder: Path, config: ModelConfig, arrays: Mapping[str, Array], num_files: int = 1, *, llama3: bool = False) -> Path:
    """params.json and consolidated.NN.pth; `llama3` splits the embedding over the vocabulary, else over the hidden size."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    params = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "hidden_dim": config.intermediate_size, "norm_eps": config.norm_epsilon,
        "vocab_size": config.vocab_size if llama3 else -1, "rope_theta": config.rotary_base,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    for number in range(num_files):
        tensors = {"rope.freqs": torch.ones(config.head_size // 2)}
        for name, array in arrays.items():
            source, axis = _meta_name(name, llama3)
            stored = interleave(array, config.head_size) if source.endswith(("wq.weight", "wk.weight")) else array
            tensors[source] = to_torch(stored if axis is None else _split(stored, num_files, axis)[number])
        torch.save(tensors, folder / f"consolidated.{number:02d}.pth")
    return folder


def _split(array: Array, parts: int, axis: int) -> list[Array]:
    import numpy as np

    return np.split(array, parts, axis)


def _meta_name(name: str, llama3: bool) -> tuple[str, int | None]:
    top: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("tok_embeddings.weight", 0 if llama3 else 1),
        "model.norm.weight": ("norm.weight", None),
        "lm_head.weight": ("output.weight", 0),
    }
    if name in top:
        return top[name]
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    source, axis = _NAMES[inner]
    return f"layers.{layer}.{source}.weight", axis
