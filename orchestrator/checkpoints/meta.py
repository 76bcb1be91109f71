"""Reader of Meta's Llama folders: params.json and consolidated.NN.pth, one file for each model-parallel rank of the release.

Presents whole tensors under Hugging Face's names: joined over the files along the axis on which Meta's code splits them, with the
rows of wq and wk in transformers' order. Source: llama/model.py of Meta's repository (ColumnParallelLinear splits axis 0,
RowParallelLinear axis 1, ParallelEmbedding axis 1 in Llama 1 and 2, VocabParallelEmbedding axis 0 in Llama 3) and transformers'
convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.base.errors import ArchitectureError, QuantizationError, SourceCorruptError, SourceMissingError, abbreviated
from orchestrator.checkpoints.assembly import assembled, read_assembled_rows
from orchestrator.checkpoints.huggingface import read_json
from orchestrator.checkpoints.safetensors import HeaderEntry
from orchestrator.checkpoints.torch_zip import read_tensors
from orchestrator.model.checkpoint import Assembly, CheckpointIndex, Piece, TensorInfo
from orchestrator.stores.source import SourceFolder

PARAMS = "params.json"
_FILE = re.compile(r"consolidated\.(\d+)\.pth")
_FILE_THREADS = 8

_COPY, _ROWS, _COLUMNS, _PAIRED, _EMBEDDING = "copy", "rows", "columns", "paired rows", "embedding"
_LAYER = {
    "attention.wq": ("self_attn.q_proj", _PAIRED),
    "attention.wk": ("self_attn.k_proj", _PAIRED),
    "attention.wv": ("self_attn.v_proj", _ROWS),
    "attention.wo": ("self_attn.o_proj", _COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", _ROWS),
    "feed_forward.w3": ("mlp.up_proj", _ROWS),
    "feed_forward.w2": ("mlp.down_proj", _COLUMNS),
    "attention_norm": ("input_layernorm", _COPY),
    "ffn_norm": ("post_attention_layernorm", _COPY),
}
"""Meta's name within a layer -> transformers' name, and the split over the files."""
_TOP = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", _EMBEDDING),
    "norm.weight": ("model.norm.weight", _COPY),
    "output.weight": ("lm_head.weight", _ROWS),
}
_COMPUTED = "rope.freqs"
"""Rotary table, which Llama 1 and 2 store although the config determines it."""

_LLAMA_3_2 = {(2048, 16), (3072, 28)}
"""(dim, n_layers) of the 1B and 3B models, whose rotary scaling has another factor that params.json does not record."""

_NUMBERS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "rope_scaling_factor", "hidden_dim",
    "rope_high_freq_factor", "multiple_of", "ffn_dim_multiplier", "vision_chunk_size",
)  # fmt: skip
_MOST = 2**40

read_rows = read_assembled_rows


def matches(names: list[str]) -> bool:
    """Whether params.json stands beside consolidated.NN.pth, without Hugging Face weights, which are preferred."""
    others = any(name.endswith((".safetensors", ".bin")) and "/" not in name for name in names)
    return PARAMS in names and any(_FILE.fullmatch(name) for name in names) and not ("config.json" in names and others)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read params.json and the descriptions of the tensors in `folder`, without running pickled code.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, UnsafePickleError, QuantizationError, ArchitectureError.
    """
    params = _read_params(folder)
    names = _file_names(folder)
    with ThreadPoolExecutor(_FILE_THREADS) as pool:
        files = [{entry.name: entry for entry in entries} for entries in pool.map(lambda name: read_tensors(folder, name), names)]
    tensors: dict[str, TensorInfo] = {}
    for source in files[0]:
        if source != _COMPUTED:
            made = _tensor(folder, source, names, files, params)
            tensors[made.name] = made
    for name, found in zip(names, files, strict=True):
        if found.keys() != files[0].keys():
            other = sorted(found.keys() ^ files[0].keys())[0]
            raise SourceCorruptError(f"{folder.url}: {other} is in only one of {names[0]} and {name}")
    config = _config(params, tensors)
    return CheckpointIndex("meta", tuple(folder.source_file(name) for name in names), tensors, config)


def _read_params(folder: SourceFolder) -> dict[str, Any]:
    """Read params.json and check the keys that are needed."""
    params = read_json(folder, PARAMS)
    for key in _NUMBERS:
        value = params.get(key)
        if value is not None and not (type(value) in (int, float) and abs(value) < _MOST):
            raise SourceCorruptError(f"{folder.url}/{PARAMS}: {key} is {abbreviated(repr(value), 60)}, not a number of a model")
    if params.get("quantization_args"):
        raise QuantizationError(f"{folder.url} is already quantized", "Build from the unquantized checkpoint.")
    if params.get("moe_args") or (params.get("vision_chunk_size") or 0) > 0:
        raise ArchitectureError(f"{folder.url} is not a dense text model", "Meta's format is read for Llama 1 to 3 only.")
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(params.get(key), int) or params[key] < 1:
            raise SourceCorruptError(f"{folder.url}/{PARAMS}: {key} is {params.get(key)!r}, not a positive number")
    if params["dim"] % params["n_heads"]:
        raise SourceCorruptError(f"{folder.url}/{PARAMS}: {params['n_heads']} heads do not divide dim {params['dim']}")
    return params


def _file_names(folder: SourceFolder) -> list[str]:
    """Return the names consolidated.NN.pth in order. Raises SourceMissingError when one is missing."""
    numbers = {int(found[1]): name for name in folder.names() if (found := _FILE.fullmatch(name))}
    if not numbers:
        raise SourceMissingError(f"{folder.url} has no consolidated.NN.pth")
    if len(numbers) <= max(numbers):
        missing = next(number for number in itertools.count() if number not in numbers)
        raise SourceMissingError(f"{folder.url} lacks consolidated.{missing:02d}.pth of {max(numbers) + 1} files")
    return [numbers[number] for number in sorted(numbers)]


def _tensor(
    folder: SourceFolder, source: str, names: Sequence[str], files: Sequence[Mapping[str, HeaderEntry]], params: Mapping[str, Any]
) -> TensorInfo:
    """Return a tensor joined over the files. A tensor that Llama does not have keeps its name: the weight map refuses it."""
    name, split = _hugging_face_name(source)
    entries = [found[source] for found in files if source in found]
    if len(entries) != len(files):
        raise SourceCorruptError(f"{folder.url}: {source} is in {names[0]} but not in all of the {len(names)} files")
    if len({(entry.dtype, entry.shape) for entry in entries}) > 1:
        raise SourceCorruptError(f"{folder.url}: {source} does not have the same dtype and shape in all files")
    axis = _axis(split, entries[0], params["dim"])
    if axis is None or len(entries) == 1:
        entries, axis = entries[:1], 0
    if axis >= len(entries[0].shape):
        raise SourceCorruptError(f"{folder.url}: {source} has shape {list(entries[0].shape)}, two axes were expected")
    pieces = tuple(Piece(file, entry.offset, entry.shape) for file, entry in enumerate(entries))
    paired = params["dim"] // params["n_heads"] if split == _PAIRED else 0
    return assembled(name, entries[0].dtype, Assembly(pieces, axis, paired))


def _hugging_face_name(source: str) -> tuple[str, str]:
    if source in _TOP:
        return _TOP[source]
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", source)
    if found and found[2] in _LAYER:
        name, split = _LAYER[found[2]]
        return f"model.layers.{found[1]}.{name}.weight", split
    return source, _COPY


def _axis(split: str, entry: HeaderEntry, dim: int) -> int | None:
    """Return the axis on which the files split a tensor; None: each file holds all of it. Embeddings show it by their width."""
    if split == _EMBEDDING:
        return 0 if entry.shape[-1] == dim else 1
    return {_COPY: None, _COLUMNS: 1}.get(split, 0)


def _config(params: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return config.json of the same model. Raises SourceCorruptError when the embedding is missing."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise SourceCorruptError("the consolidated files lack tok_embeddings.weight")
    scaled, base = bool(params.get("use_scaled_rope")), float(params.get("rope_theta") or 10000.0)
    vocab = params.get("vocab_size") or -1
    positions = 131072 if scaled else 8192 if base == 500000.0 else 2048
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params["dim"],
        "intermediate_size": _intermediate_size(params),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "vocab_size": vocab if vocab > 0 else embedding.shape[0],
        "hidden_act": "silu",
        "rms_norm_eps": params.get("norm_eps") or 1e-5,
        "rope_theta": base,
        "rope_scaling": _rotary_scaling(params) if scaled else None,
        "max_position_embeddings": positions,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }


def _rotary_scaling(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scaling of Llama 3.1 (`apply_scaling` in Meta's llama_models/llama3/model.py)."""
    factor = params.get("rope_scaling_factor") or (32.0 if (params["dim"], params["n_layers"]) in _LLAMA_3_2 else 8.0)
    return {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
        "original_max_position_embeddings": 8192,
    }


def _intermediate_size(params: Mapping[str, Any]) -> int:
    """Return hidden_dim, else 2/3 * 4 dim * ffn_dim_multiplier, rounded up to multiple_of (FeedForward in llama/model.py)."""
    if params.get("hidden_dim"):
        return int(params["hidden_dim"])
    multiple = params.get("multiple_of") or 1
    size = int((params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * params["dim"] / 3))
    return int(multiple * math.ceil(size / multiple))
