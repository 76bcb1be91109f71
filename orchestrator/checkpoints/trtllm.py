"""Reader of TensorRT-LLM checkpoints: config.json and rank{N}.safetensors, with whole tensors gathered over the ranks.

Gathering reads the weight map of conversion backwards, for the checkpoint's topology. So one table per family describes both
directions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.dtypes import MODEL_DTYPE_NAMES, MODEL_DTYPES, num_bytes
from orchestrator.base.errors import (
    ArchitectureError,
    QuantizationError,
    SourceCorruptError,
    SourceMissingError,
    WeightMapError,
)
from orchestrator.checkpoints.assembly import assembled, read_assembled_rows
from orchestrator.checkpoints.huggingface import check_file_names, read_json
from orchestrator.checkpoints.safetensors import HeaderEntry, read_header_at
from orchestrator.families import family_for
from orchestrator.model import topology as topologies
from orchestrator.model.checkpoint import Assembly, CheckpointIndex, Piece, TensorInfo
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_experts import layer_keys
from orchestrator.model.config_heads import global_head_keys
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.config_latent import LATENT_KEYS
from orchestrator.model.config_table import ConfigTable
from orchestrator.model.config_trtllm import from_trtllm, to_trtllm
from orchestrator.model.quantization import ModelQuantization, quant_cfg
from orchestrator.model.rules import Family, Part, Span, Where
from orchestrator.model.targets import Read, Target
from orchestrator.model.topology import Topology, check
from orchestrator.model.weight_map import WeightMap, weight_map
from orchestrator.stores.source import SourceFolder

CONFIG = "config.json"
_HEADER_THREADS = 8
_NO_LIMIT = 2**62
_COMPUTED = {"embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq"}
"""Rotary tables that TensorRT-LLM's converter writes to every rank although the config determines them."""
_POSITIONS = "rope_gpt_neox"
"""Supported position_embedding_type. Other types keep their numbers in other keys than rotary_scaling."""
_LAYOUT = {"use_parallel_embedding", "embedding_sharding_dim"}
"""Fields that describe the layout of the ranks, not the model."""
_SPELLINGS = {"LLaMAForCausalLM": "LlamaForCausalLM", "QWenForCausalLM": "Qwen2ForCausalLM"}
"""TensorRT-LLM's other names of architectures (its MODEL_MAP)."""
_INVERSES: dict[str, Callable[[Any], Any]] = {
    "is": lambda value: value,
    "sqrt": lambda value: value**2,
    "rsqrt": lambda value: value**-2,
    "inverse": lambda value: 1.0 / value,
    "per_head": lambda value: value == "head",
    "where_rotated": lambda value: value == "rotated",
}
"""Inverses of model.config_hugging_face.TRANSFORMS."""

read_rows = read_assembled_rows


def matches(names: list[str]) -> bool:
    """Whether config.json stands beside rank files."""
    return CONFIG in names and any(re.fullmatch(r"rank\d+(-.*)?\.safetensors", name) for name in names)


def read_index(folder: SourceFolder) -> CheckpointIndex:
    """Read config.json and every rank's headers.

    Raises SourceMissingError, SourceCorruptError, LfsPointerError, QuantizationError, ArchitectureError, TopologyError;
    WeightMapError for tensors that the family has no rule for.
    """
    config, topology, family = _read_config(folder)
    present = set(folder.names())
    shards = [rank_files(folder, present, number) for number in range(topology.num_files)]
    names = [name for files in shards for name in files]
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        headers = list(pool.map(lambda name: read_header_at(folder, name)[0], names))
    ranks: list[_Rank] = []
    for rank, files in enumerate(shards):
        first = sum(len(earlier) for earlier in shards[:rank])
        found = {entry.name: (number, entry) for number in range(first, first + len(files)) for entry in headers[number]}
        ranks.append(_Rank(f"{folder.url}/rank{rank}", found))
    tensors = _gather(ranks, family, config, topology)
    return CheckpointIndex(
        "trtllm", tuple(folder.source_file(name) for name in names), tensors, hugging_face_config(config, family)
    )


def _read_config(folder: SourceFolder) -> tuple[ModelConfig, Topology, Family]:
    plain = read_json(folder, CONFIG)
    quantization = plain.get("quantization") or {}
    if not isinstance(quantization, dict):
        raise SourceCorruptError(f"{folder.url}/{CONFIG}: quantization is not a JSON object")
    algorithm = quantization.get("quant_algo") or quantization.get("kv_cache_quant_algo")
    if algorithm:
        raise QuantizationError(f"{folder.url} is already quantized ({algorithm})", "Build from the unquantized checkpoint.")
    positions = plain.get("position_embedding_type")
    if positions not in (None, _POSITIONS):
        raise ArchitectureError(
            f"position_embedding_type in {folder.url}/{CONFIG} is {str(positions)[:40]!r}, which is not supported",
            "Build from the Hugging Face checkpoint.",
        )
    name = plain.get("architecture")
    try:
        config, topology = from_trtllm({**plain, "architecture": _SPELLINGS.get(str(name), name)})
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise SourceCorruptError(f"{folder.url}/{CONFIG} is not the config of a TensorRT-LLM checkpoint: {error}") from None
    family = family_for(config.architecture)
    check(topology, config.limits())
    return _normalized(config), topology, family


def _normalized(config: ModelConfig) -> ModelConfig:
    """Normalize rotary_scaling to the form of from_hugging_face. The converter of Meta's files omits the numbers of llama3."""
    scaling = dict(config.rotary_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "llama3":
        usual = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        scaling = {**usual, **scaling}
    changes = {"rotary_scaling": None if kind == "default" else {**scaling, "rope_type": kind}}
    return config.model_copy(update=changes)


def rank_files(folder: SourceFolder, present: set[str], rank: int) -> list[str]:
    """Return the single file of a rank, or the shards of its index. `rank` is a file number: context-parallel ranks share files.

    Raises SourceMissingError, SourceCorruptError.
    """
    single, listing = f"rank{rank}.safetensors", f"rank{rank}.safetensors.index.json"
    if single in present:
        return [single]
    if listing not in present:
        raise SourceMissingError(f"{folder.url} has no {single}", "Every rank that config.json's mapping names must be present.")
    listed = read_json(folder, listing).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise SourceCorruptError(f"{folder.url}/{listing} has no weight_map")
    check_file_names(list(listed.values()), r"[^/\\]+\.safetensors", f"{folder.url}/{listing}")
    missing = sorted(set(listed.values()) - present)
    if missing:
        raise SourceMissingError(f"{folder.url}/{listing} names the shard {missing[0]}, which is missing")
    return sorted(set(listed.values()))


@dataclass(frozen=True)
class _Rank:
    """Tensors in one rank's files."""

    where: str
    entries: Mapping[str, tuple[int, HeaderEntry]]
    """Name -> file number, entry of the header."""


@dataclass(frozen=True, slots=True)
class _Share:
    """A block of a whole tensor that a rank holds, starting at `begin` on `axis`."""

    axis: int
    begin: int
    piece: Piece
    dtype: str
    added: float
    """Number that conversion added to every element."""


def _gather(ranks: Sequence[_Rank], family: Family, config: ModelConfig, topology: Topology) -> dict[str, TensorInfo]:
    """Return every whole tensor under its Hugging Face name."""
    whole = _whole_tensors(family, config)
    index = CheckpointIndex("trtllm", (), whole)
    shares: dict[str, list[_Share]] = {}
    seen: set[tuple[int, str]] = set()
    for group in weight_map(index, family, config, topology, _NO_LIMIT).groups:
        stage = [topology.file_number(tp_rank, group.pp_rank) for tp_rank in range(topology.tp)]
        for target in group.targets:
            shared = all(read.tensor.name in shares for read in target.reads)
            if shared and not any(target.name in ranks[rank].entries for rank in stage):
                continue  # a tied head may be missing
            seen |= {(rank, target.name) for rank in stage}
            if _is_rounded(target):
                continue  # the source is read from its exact float32 copy
            for tp_rank, rank in enumerate(stage):
                for name, share in _shares(target, tp_rank, ranks[rank]):
                    shares.setdefault(name, []).append(share)
    _check_all_seen(ranks, seen, family)
    return {name: _join(name, whole[name].shape, found) for name, found in shares.items()}


def _is_rounded(target: Target) -> bool:
    """Whether a number was added to the source before rounding."""
    return target.dtype != "F32" and any(read.add for read in target.reads)


def _whole_tensors(family: Family, config: ModelConfig) -> dict[str, TensorInfo]:
    """Return the tensors that the family's rules read, with shapes from the config and without locations."""
    dtype = MODEL_DTYPES[config.dtype]
    tensors: dict[str, TensorInfo] = {}
    for rule in family.rules:
        if not rule.applies(config):
            continue
        layers = [0]
        if rule.where is Where.EVERY_LAYER:
            layers = [layer for layer in range(config.num_hidden_layers) if rule.in_layer(config, layer)]
        experts = range(config.moe.num_experts if config.moe and rule.per_expert else 1)
        for part in rule.parts:
            if part.add and not config.exact_norms:
                raise ArchitectureError(
                    f"checkpoints of {family.name} store {part.source} rounded after adding {part.add:g}, which cannot be undone",
                    "Build from the Hugging Face checkpoint.",
                )
            if part.fusion is not None:
                raise ArchitectureError(
                    f"{part.source.format(layer=0)} of {family.name} holds all experts, which rank files cannot be joined to yet",
                    "Build from the Hugging Face checkpoint.",
                )
            for layer in layers:
                shape = _whole_shape(part, config.of_layer(layer))
                size = num_bytes(dtype, math.prod(shape))
                for name in (part.source.format(layer=layer, expert=expert) for expert in experts):
                    tensors[name] = TensorInfo(name, dtype, shape, 0, 0, size)
    return tensors


def _whole_shape(part: Part, config: ModelConfig) -> tuple[int, ...]:
    dims = config.dims()
    shape = tuple(dims[dim] for dim in part.shape)
    return (sum(dims[dim] for dim in part.sections), *shape[1:]) if part.sections else shape


def _shares(target: Target, tp_rank: int, rank: _Rank) -> Iterator[tuple[str, _Share]]:
    """Yield the whole tensor and the block of each read that the rank's tensor was joined from, without padding rows."""
    if target.name not in rank.entries:
        raise SourceMissingError(f"{rank.where} lacks {target.name}")
    file, entry = rank.entries[target.name]
    if entry.shape != target.shape:
        raise SourceCorruptError(
            f"{rank.where}: {target.name} is {list(entry.shape)}, config.json says {list(target.shape)}",
            "config.json and the ranks belong to different models or topologies.",
        )
    if entry.dtype not in MODEL_DTYPE_NAMES:
        raise QuantizationError(f"{rank.where}: {target.name} is {entry.dtype}", "Build from the unquantized checkpoint.")
    offset = entry.offset
    for read in target.reads:
        span = _span(read, tp_rank)
        if span is None:
            continue
        axis, shape = read.axis or 0, list(read.tensor.shape)
        shape[axis] = span.length
        size = num_bytes(entry.dtype, math.prod(shape))
        shape[axis] = span.end - span.begin
        if span.begin < span.end:
            yield read.tensor.name, _Share(axis, span.begin, Piece(file, offset, tuple(shape)), entry.dtype, read.add)
        offset += size


def _span(read: Read, tp_rank: int) -> Span | None:
    """Return the span that a rank holds of a read; None: nothing."""
    if read.ranks and tp_rank not in read.ranks:
        return None
    if not read.spans:
        return Span(0, read.tensor.shape[0])
    return read.spans[read.ranks.index(tp_rank) if read.ranks else tp_rank]


def _join(name: str, shape: tuple[int, ...], shares: list[_Share]) -> TensorInfo:
    """Join the blocks in order, each once, because several ranks may hold the same block.

    Raises SourceCorruptError when blocks are missing or differ in dtype.
    """
    axis, dtype = shares[0].axis, shares[0].dtype
    pieces: list[Piece] = []
    position = 0
    for share in sorted((share for share in shares if share.axis == axis), key=lambda share: share.begin):
        if share.dtype != dtype:
            raise SourceCorruptError(f"{name} is {dtype} on one rank and {share.dtype} on another")
        if share.begin == position:
            pieces.append(share.piece)
            position += share.piece.shape[axis]
    if position != shape[axis]:
        raise SourceCorruptError(f"the ranks hold {position} of {shape[axis]} elements of {name}")
    return assembled(name, dtype, Assembly(tuple(pieces), axis, add=-shares[0].added))


def _check_all_seen(ranks: Sequence[_Rank], seen: set[tuple[int, str]], family: Family) -> None:
    """Refuse tensors that gathering would drop. Raises WeightMapError."""
    for number, rank in enumerate(ranks):
        unknown = [name for name in rank.entries if (number, name) not in seen and name not in _COMPUTED]
        if unknown:
            raise WeightMapError(
                f"{rank.where} holds {len(unknown)} tensors that {family.name} has no rule for: {', '.join(unknown[:3])}",
                "The checkpoint is quantized, of another architecture, or of another topology.",
            )


def hugging_face_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return a config.json that from_hugging_face reads as `config`. Raises ArchitectureError when there is none."""
    table, layers = family.config, range(config.num_hidden_layers)
    made: dict[str, Any] = {
        **{key: built[0] for key, built in table.only.items()},
        "architectures": [config.architecture],
        "dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        table.dense_size: config.intermediate_size,
        table.activation: next((name for name, act in table.activations.items() if act == config.hidden_act), config.hidden_act),
        **_norm_keys(config, table),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": _rotary_keys(config),
        **_window_keys(config, table),
        **({} if table.rotary.layers is None else {table.rotary.layers: [int(config.has_rotary(layer)) for layer in layers]}),
        **_temperature_keys(config, table),
        **({} if table.embedding_switch is None else {table.embedding_switch: config.embedding_multiplier != 1.0}),
        **(global_head_keys(config.model_dump()) if table.global_heads else {}),
        **_rotated_keys(config, table),
        **_expert_keys(config, table),
        **_latent_keys(config, table),
    }
    if config.rotary_embedding_dim and not config.is_latent:
        made["partial_rotary_factor"] = config.rotary_embedding_dim / config.head_size
    if "original_max_position_embeddings" in table.defaults:
        made["original_max_position_embeddings"] = (config.rotary_scaling or {}).get("original_max_position_embeddings", 1)
    for field, (transform, key) in table.derived.items():
        value = getattr(config, field)
        if key not in made:
            made[key] = value if value is None or isinstance(value, bool) else _INVERSES[transform](value)
    read = from_hugging_face(made, config.architecture, config.dtype, table)
    fields = ModelConfig.model_fields.keys() - _LAYOUT - {"rotary_scaling"}
    wrong = sorted(field for field in fields if getattr(read, field) != getattr(config, field))
    if not _is_same_scaling(read.rotary_scaling, config.rotary_scaling):
        wrong.append("rotary_scaling")
    if wrong:
        raise ArchitectureError(
            f"config.json of this {config.architecture} cannot be read as {family.name}: {', '.join(wrong)} differ",
            "Build from the Hugging Face checkpoint.",
        )
    return made


def _is_same_scaling(read: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> bool:
    """Whether the complete dictionary `read` agrees with `given`, which may lack defaults and have unused keys."""
    if read is None or given is None:
        return read is given
    return all(given.get(key) in (None, value) for key, value in read.items())


def _rotary_keys(config: ModelConfig) -> dict[str, Any]:
    """Return rope_parameters: one dictionary for all layers, or one per kind of layer."""
    full = {"rope_type": "default", **(config.rotary_scaling or {}), "rope_theta": config.rotary_base}
    if config.query_scale_beta is not None and config.query_scale_floor is None:
        full["llama_4_scaling_beta"] = config.query_scale_beta
    if config.rotary_base_local is None:
        return full
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": config.rotary_base_local}}


def _window_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    """Return the keys that the family's rule for windows reads."""
    if table.windows == "none":
        return {}
    made: dict[str, Any] = {table.window_key: config.sliding_window}
    if "use_sliding_window" in table.defaults:
        made["use_sliding_window"] = config.sliding_window is not None
    if "layer_types" in table.defaults:
        layers = range(config.num_hidden_layers)
        made["layer_types"] = [table.window_kind if config.has_window(layer) else "full_attention" for layer in layers]
    return made


def _rotated_keys(config: ModelConfig, table: ConfigTable) -> dict[str, int]:
    """Return the key that rotates layers without a window too."""
    if table.rotary.dense_too is None:
        return {}
    layers = range(config.num_hidden_layers)
    return {table.rotary.dense_too: 1 if any(config.has_rotary(each) and not config.has_window(each) for each in layers) else 2}


def _norm_keys(config: ModelConfig, table: ConfigTable) -> dict[str, float | None]:
    if table.rms_epsilon is None:
        return {table.epsilon: config.norm_epsilon}
    if config.norm_kind == "rms":
        return {table.rms_epsilon: config.norm_epsilon}
    return {table.epsilon: config.norm_epsilon, table.rms_epsilon: None}


def _temperature_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    """Return the keys of the scale of queries by position in the layers without rotary embedding."""
    if table.rotary.temperature is None:
        return {}
    switch, length, factor = table.rotary.temperature
    if config.query_scale_beta is None:
        return {switch: False}
    return {switch: True, length: config.query_scale_floor, factor: config.query_scale_beta}


def _latent_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    """Return the sizes of latent attention, and the key/value heads as such models count them."""
    if not config.is_latent:
        return {}
    return {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_size if table.rotary.partial else config.qk_rope_head_dim,
        **{key: getattr(config, key) for key in LATENT_KEYS},
        "q_lora_rank": config.q_lora_rank or None,
    }


def _expert_keys(config: ModelConfig, table: ConfigTable) -> dict[str, Any]:
    experts, moe = table.experts, config.moe
    if experts is None or moe is None:
        return {} if experts is None or experts.switch is None else {experts.switch: False}
    made: dict[str, Any] = {
        experts.count: moe.num_experts,
        experts.chosen: moe.top_k,
        experts.size: config.expert_size,
        **layer_keys(moe.layers or (True,) * config.num_hidden_layers, experts),
    }
    optional = {
        experts.switch: True,
        experts.selection: moe.scoring.removesuffix("_of_chosen"),
        experts.combination: "sum" if moe.output_scale == 1.0 else "average",
        experts.normalized: moe.normalization_mode == 1,
        experts.shared_size: moe.shared_expert_intermediate_size,
        experts.shared_count: moe.shared_expert_intermediate_size // config.expert_size,
        experts.routed_scale: moe.routed_scale,
        experts.sum_minimum: moe.sum_minimum,
        experts.jitter: moe.jitter,
    }
    made |= {key: value for key, value in optional.items() if key is not None}
    if experts.groups:
        made |= dict(zip(experts.groups, (moe.num_groups, moe.kept_groups), strict=True))
    return made


def write_checkpoint_config(
    folder: Path, config: ModelConfig, topology: topologies.Topology, quantization: ModelQuantization | None
) -> None:
    """Write quant_cfg.json, for mixed precision only, and last config.json of a TensorRT-LLM checkpoint."""
    for name, value in config_files(config, topology, quantization).items():
        write_json(folder / name, value)


def config_files(
    config: ModelConfig, topology: topologies.Topology, quantization: ModelQuantization | None
) -> dict[str, dict[str, Any]]:
    """Return quant_cfg.json, for mixed precision only, and config.json of a TensorRT-LLM checkpoint, by name."""
    mixture = quant_cfg(quantization) if quantization else None
    return {**({"quant_cfg.json": mixture} if mixture else {}), CONFIG: to_trtllm(config, topology, quantization)}


def shard_indexes(weights: WeightMap, topology: topologies.Topology) -> dict[str, dict[str, Any]]:
    """Return rank{N}.safetensors.index.json of the ranks with several shards, in Hugging Face's format, by name."""
    found = {}
    for number in range(topology.num_files):
        groups = weights.stage(number // topology.tp)
        if len(groups) > 1:
            listed = {target.name: group.shard_name(number) for group in groups for target in group.targets}
            size = sum(group.shard_bytes for group in groups)
            found[f"rank{number}.safetensors.index.json"] = {"metadata": {"total_size": size}, "weight_map": listed}
    return found


def write_json(path: Path, value: Any, indent: int = 4) -> None:
    """Write a JSON file, whole or not at all."""
    from orchestrator.stores.file import write_whole

    write_whole(path, (json.dumps(value, indent=indent) + "\n").encode())
