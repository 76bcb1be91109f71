"""Warnings and notes about a legal build: widths that are slow in GEMM kernels, padding rows, tensors read twice.

Nothing is refused here. `topology.check` and the weight map refuse builds that are impossible.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from orchestrator.base.dtypes import ITEM_BITS, MODEL_DTYPES
from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import ModelQuantization, packed
from orchestrator.model.rules import PREDICTS_FURTHER
from orchestrator.model.topology import Topology, as_set, legal_tp
from orchestrator.model.weight_map import WeightMap

_VECTOR_BYTES = 16
"""Size of a load in tensor-core kernels: the alignment of leading dimensions in cuBLAS and CUTLASS."""
_SECTOR_BYTES = 32
"""Size of a transfer of GPU memory."""


def gemm_warnings(config: ModelConfig, topology: Topology, quantization: ModelQuantization | None = None) -> tuple[str, ...]:
    """Return a warning for each GEMM width of a rank that is not a multiple of 32 bytes, with the tp that would make it one.

    Bytes are those of stored weights: 4 bits per element for formats that pack two per byte.
    """
    kind, bits = _narrowest(config, quantization)
    found = []
    for name, width in local_widths(config, topology).items():
        size = width * bits / 8
        if size % _SECTOR_BYTES:
            rule = f"not a multiple of {_VECTOR_BYTES if size % _VECTOR_BYTES else _SECTOR_BYTES} as fast GEMM kernels want"
            found.append(f"{name}: {width} elements of {kind}, {size:g} bytes, {rule}; {_aligned(name, bits, config, topology)}")
    return tuple(found)


def _narrowest(config: ModelConfig, quantization: ModelQuantization | None) -> tuple[str, int]:
    """Return the name and the bits per element of the narrowest weights of the model."""
    kinds: dict[str, int] = {config.dtype: ITEM_BITS[MODEL_DTYPES[config.dtype]]}
    for fmt in quantization.formats() if quantization is not None else ():
        dtype, (rows, columns) = packed(fmt, (2, 2))
        kinds[fmt.algorithm] = ITEM_BITS[dtype] * rows * columns // 4
    return min(kinds.items(), key=lambda item: item[1])


def local_widths(config: ModelConfig, topology: Topology) -> dict[str, int]:
    """Return the widths of a rank's weight matrices, in elements, by names that users know."""
    tp, head = topology.tp, config.cache_head_size
    widths = {
        "hidden_size": config.hidden_size,
        "query heads of a rank": config.num_attention_heads // tp * config.head_size,
        "key/value heads of a rank": config.kv_heads_per_rank(tp) * head,
    }
    limits = config.limits()
    if limits.intermediate_size:
        widths["intermediate_size of a rank"] = limits.intermediate_size // tp
    if limits.shared_expert_intermediate_size:
        widths["intermediate size of the shared expert on a rank"] = limits.shared_expert_intermediate_size // tp
    if limits.num_experts:
        widths["intermediate size of an expert on a rank"] = config.expert_size // topology.moe_tp
    return widths


def _aligned(name: str, bits: int, config: ModelConfig, topology: Topology) -> str:
    """Return the text with the legal tp, for the same moe_ep, that give this width whole sectors."""
    sizes = [
        tp
        for tp in legal_tp(config.limits(), topology.moe_ep)
        if local_widths(config, Topology(tp, 1, moe_ep=topology.moe_ep))[name] * bits % (8 * _SECTOR_BYTES) == 0
    ]
    return f"a multiple of {_SECTOR_BYTES} with tp in {as_set(sizes)}" if sizes else "no legal tp makes it one"


_FUSED_HEAD_SIZE = 256
"""Head size above which TensorRT-RTX is taken to have no fused kernel of attention: seen for 576 (version 1.7)."""


def kernel_warnings(config: ModelConfig, backend: str) -> tuple[str, ...]:
    """Return a warning if the backend has no fused kernel for the model's attention, so that its scores lie in memory."""
    size = max(config.cache_head_size, config.global_head_size)
    if backend != "tensorrt_rtx" or size <= _FUSED_HEAD_SIZE:
        return ()
    what = "latent attention (MLA) has heads" if config.is_latent else "attention has heads"
    return (
        f"{what} of {size} elements, for which TensorRT-RTX has no fused kernel: it computes attention in several kernels, with "
        "the scores of all heads in memory",
    )


def left_out_notes(weights: WeightMap) -> tuple[str, ...]:
    """Return a note about the tensors of layers that predict further tokens; empty: the source has none."""
    names = [name for name, reason in weights.ignored if reason == PREDICTS_FURTHER]
    return (f"{len(names)} tensors are left out, such as {names[0]}: {PREDICTS_FURTHER}",) if names else ()


def padding_notes(config: ModelConfig, topology: Topology) -> tuple[str, ...]:
    """Return a note about the zero rows that pad the vocabulary; empty: none."""
    padded = config.padded_vocab_size(topology.tp)
    rows = padded - config.vocab_size
    if not rows:
        return ()
    split_too = config.use_parallel_embedding and config.embedding_sharding_dim == 0
    where = "lm_head and embedding" if split_too else "lm_head"
    count = "1 row" if rows == 1 else f"{rows} rows"
    return (
        f"the vocabulary of {config.vocab_size} is padded to {padded} for tp={topology.tp}: {count} of zeros at the end of {where}",
    )


def shared_chunks(weights: WeightMap) -> tuple[str, ...]:
    """Return a note about arrays with chunks that span the layers of several conversion tasks; empty: none."""
    readers: Counter[tuple[Any, ...]] = Counter()
    sizes: dict[tuple[Any, ...], int] = {}
    for group in weights.groups:
        arrays = {tensor.array.key: tensor.array for tensor in group.sources().values() if tensor.array is not None}
        readers.update(arrays.keys())
        sizes |= {key: array.all_bytes for key, array in arrays.items()}
    shared = [key for key, count in readers.items() if count > 1]
    if not shared:
        return ()
    once, all_reads = sum(sizes[key] for key in shared), sum(sizes[key] * readers[key] for key in shared)
    return (
        f"{len(shared)} arrays hold layers of several conversion tasks, each of which reads them whole: {all_reads:,} bytes "
        f"instead of {once:,}. A larger conversion.max_shard_bytes makes fewer tasks",
    )


def repeated_reads(weights: WeightMap) -> tuple[str, ...]:
    """Return a note for each source tensor that several conversion tasks read, e.g. a tied embedding."""
    groups = Counter(name for group in weights.groups for name in group.sources())
    repeated = [name for name, count in groups.items() if count > 1]
    if not repeated:
        return ()
    tensors = {name: tensor for group in weights.groups for name, tensor in group.sources().items() if name in repeated}
    return tuple(
        f"{name} ({tensors[name].stored_bytes:,} bytes) is read {groups[name]} times, by separate conversion tasks"
        for name in repeated
    )
