"""Llama presets of KerasHub of any shape, written with h5py: the way back of the reader. KerasHub's own are in keras_presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from orchestrator.model.config import ModelConfig
from tests.support.synthetic import Array

_LAYER = {
    "self_attn.q_proj": "_self_attention_layer/_query_dense", "self_attn.k_proj": "_self_attention_layer/_key_dense",
    "self_attn.v_proj": "_self_attention_layer/_value_dense", "self_attn.o_proj": "_self_attention_layer/_output_dense",
    "mlp.gate_proj": "_feedforward_gate_dense", "mlp.up_proj": "_feedforward_intermediate_dense",
    "mlp.down_proj": "_feedforward_output_dense", "input_layernorm": "_self_attention_layernorm",
    "post_attention_layernorm": "_feedforward_layernorm",
}  # fmt: skip
_TOP = {
    "model.embed_tokens.weight": "layers/reversible_embedding/vars/0", "lm_head.weight": "layers/reversible_embedding/vars/1",
    "model.norm.weight": "layers/llama_layer_norm/vars/0",
}  # fmt: skip


def write_preset(folder: Path, config: ModelConfig, arrays: Mapping[str, Array]) -> Path:
    """config.json and model.weights.h5. Arrays are taken one by one, so `arrays` may make them when asked."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "vocabulary_size": config.vocab_size, "num_layers": config.num_hidden_layers,
        "num_query_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "hidden_dim": config.hidden_size, "intermediate_dim": config.intermediate_size,
        "rope_max_wavelength": config.rotary_base, "layer_norm_epsilon": config.norm_epsilon,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"class_name": "Llama3Backbone", "config": fields}))
    with h5py.File(folder / "model.weights.h5", "w") as file:
        for name in arrays:
            _write(file, name, arrays[name], config.head_size)
    return folder


def _write(file: h5py.File, name: str, array: Array, head_size: int) -> None:
    path = _TOP.get(name) or _layer_path(name)
    if array.ndim == 2 and name != "model.embed_tokens.weight":
        array = np.ascontiguousarray(array.T)
        if path.endswith(("query_dense/vars/0", "key_dense/vars/0", "value_dense/vars/0")):
            array = array.reshape(len(array), -1, head_size)
        elif path.endswith("attention_layer/_output_dense/vars/0"):
            array = array.reshape(-1, head_size, array.shape[1])
    stored = array.view("V2") if array.dtype.name == "bfloat16" else array
    dataset = file.create_dataset(path, data=stored)
    if stored is not array:
        dataset.attrs["dtype"] = "bfloat16"


def _layer_path(name: str) -> str:
    _, _, number, inner = name.removesuffix(".weight").split(".", 3)
    suffix = "" if number == "0" else f"_{number}"
    return f"layers/llama_transformer_decoder{suffix}/{_LAYER[inner]}/vars/0"
