"""Llama-like checkpoints made with numpy alone: no torch, no transformers, the same layout on every machine."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import num_bytes
from orchestrator.model.checkpoint import CheckpointIndex, SourceFile, TensorInfo
from orchestrator.model.config import ModelConfig
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode

Array = npt.NDArray[Any]
NUMPY_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
}
SAFETENSORS_DTYPES = {np.dtype(kind): name for name, kind in NUMPY_DTYPES.items()}
FIXED_TIME_NS = 1_700_000_000_000_000_000
"""Modification time of what write_source writes, so that digests of plans are the same everywhere."""


def model_config(**changes: Any) -> ModelConfig:
    """A small grouped-query Llama; `changes` are fields of ModelConfig."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "vocab_size": 37,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 4,
        "intermediate_size": 24,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 64,
        "rotary_base": 10000.0,
    }
    return ModelConfig(**{**fields, **changes})


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint of `config`; a tied head is left out, as transformers does."""
    hidden, inter, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        linears = {
            "self_attn.q_proj": (query, hidden, config.attn_bias),
            "self_attn.k_proj": (key, hidden, config.attn_bias),
            "self_attn.v_proj": (key, hidden, config.attn_bias),
            "self_attn.o_proj": (hidden, query, config.attn_dense_bias),
            "mlp.gate_proj": (inter, hidden, config.mlp_bias),
            "mlp.up_proj": (inter, hidden, config.mlp_bias),
            "mlp.down_proj": (hidden, inter, config.mlp_bias),
        }
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def synthetic_index(config: ModelConfig, dtype: str = "BF16", num_files: int = 1, **extra: tuple[int, ...]) -> CheckpointIndex:
    """The index of a checkpoint that nobody wrote; `extra` are tensors that no rule names ('__' stands for '.')."""
    shapes = {**tensor_shapes(config), **{name.replace("__", "."): shape for name, shape in extra.items()}}
    ends = [0] * num_files
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        file, size = number % num_files, num_bytes(dtype, math.prod(shape))
        tensors[name] = TensorInfo(name, dtype, shape, file, ends[file], size)
        ends[file] += size
    files = tuple(SourceFile(f"{file}.safetensors", end, f"sha256:{file}") for file, end in enumerate(ends))
    return CheckpointIndex("huggingface", files, tensors)


def random_arrays(config: ModelConfig, dtype: str = "BF16", seed: int = 1) -> dict[str, Array]:
    """Normal weights for every tensor of `config`."""
    generator = np.random.default_rng(seed)
    kind = NUMPY_DTYPES[dtype]
    return {name: generator.standard_normal(shape).astype(kind) for name, shape in tensor_shapes(config).items()}


def encode_safetensors(arrays: Mapping[str, Array]) -> bytes:
    """A safetensors file, written from the format's specification."""
    header: dict[str, Any] = {}
    position = 0
    for name, array in arrays.items():
        span = [position, position + array.nbytes]
        header[name] = {"dtype": SAFETENSORS_DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": span}
        position += array.nbytes
    return frame(header, b"".join(array.tobytes() for array in arrays.values()))


def frame(header: Any, data: bytes) -> bytes:
    """A header of any content before `data`."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "attention_bias": config.attn_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def write_source(folder: Path, config: ModelConfig, arrays: Mapping[str, Array], num_files: int = 1) -> Path:
    """Write a Hugging Face folder; with several files, tensors go to them in turn, under an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config), indent=1))
    if num_files == 1:
        (folder / "model.safetensors").write_bytes(encode_safetensors(arrays))
    else:
        _write_shards(folder, arrays, num_files)
    for path in folder.iterdir():
        os.utime(path, ns=(FIXED_TIME_NS, FIXED_TIME_NS))
    return folder


def _write_shards(folder: Path, arrays: Mapping[str, Array], num_files: int) -> None:
    listed = {name: f"model-{number % num_files + 1:05d}-of-{num_files:05d}.safetensors" for number, name in enumerate(arrays)}
    for shard in sorted(set(listed.values())):
        (folder / shard).write_bytes(encode_safetensors({name: array for name, array in arrays.items() if listed[name] == shard}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def build_spec(source: str | Path, **sections: Any) -> BuildSpec:
    """A small spec; keywords replace whole sections."""
    plain = {
        "source": {"path": str(source)},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"max_tokens": 12, "decode_steps": 3},
        "release": {"name": "tiny", "version": "1"},
        **sections,
    }
    return decode(BuildSpec, plain, "test")
