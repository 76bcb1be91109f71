"""Reader of TensorRT-LLM checkpoints: config.json and rank{N}.safetensors, with whole tensors gathered over the ranks.

Gathering reads the weight map of conversion backwards, for the checkpoint's topology. So one table per family describes both
directions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.base.dtypes import MODEL_DTYPE_NAMES, MODEL_DTYPES, num_bytes
from orchestrator.base.errors import (
    ArchitectureError,
    QuantizationError,
    SourceCorruptError,
    SourceMissingError,
    WeightMapError,
)
from orchestrator.checkpoints.assembly import assembled, read_assembled_rows
from orchestrator.checkpoints.hugging_face_config import hugging_face_config
from orchestrator.checkpoints.huggingface import check_file_names, read_json
from orchestrator.checkpoints.safetensors import HeaderEntry, read_header_at
from orchestrator.families import family_for
from orchestrator.model.checkpoint import Assembly, CheckpointIndex, Piece, TensorInfo
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_trtllm import from_trtllm
from orchestrator.model.rules import Family, Part, Span, Where
from orchestrator.model.targets import Read, Target
from orchestrator.model.topology import Topology, check
from orchestrator.model.weight_map import weight_map
from orchestrator.stores.source import SourceFolder

CONFIG = "config.json"
_HEADER_THREADS = 8
_NO_LIMIT = 2**62
_COMPUTED = {"embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq"}
"""Rotary tables that TensorRT-LLM's converter writes to every rank although the config determines them."""
_POSITIONS = "rope_gpt_neox"
"""Supported position_embedding_type. Other types keep their numbers in other keys than rotary_scaling."""
_SPELLINGS = {"LLaMAForCausalLM": "LlamaForCausalLM", "QWenForCausalLM": "Qwen2ForCausalLM"}
"""TensorRT-LLM's other names of architectures (its MODEL_MAP)."""
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
