"""Targets of quantized weights: the packed weight, its scales, and the scales of the KV cache.

Per-tensor quantities of fused linears are the largest of their members' (Model Optimizer's `preprocess_linear_fusion`). Linears
are fused if they are joined into one tensor, or if they share their input and the format fuses the gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.base.errors import QuantizationError
from orchestrator.model.quantization import (
    KV_CACHE_MAX,
    KV_CACHE_SCALES,
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    KvCacheFormat,
    LinearFormat,
    ScaleTensor,
    WeightFormat,
    packed,
    scale_tensors,
)
from orchestrator.model.rules import Span
from orchestrator.model.targets import ArtifactScale, PackedScale, QuantizedWeight, Read, Target

_BLOCKS = (16, 32, 64, 128, 256)
_EXPERT_PART = re.compile(r"(.+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """A linear that cannot be stored in its format."""

    linear: str
    reason: str
    legal_blocks: tuple[int, ...] | None = None
    """Block sizes that fit this linear; None: no block size does."""


def quantized(target: Target, fmt: LinearFormat, partners: Sequence[str], num_ranks: int) -> tuple[Target, ...]:
    """Return the packed weight and the scales that replace the plain weight `target`, [out, in] or [experts, out, in].

    `partners`: source modules that share their per-tensor quantities with this linear (mlp.gate for mlp.fc).
    """
    *experts, out, inner = target.shape
    linear = target.name.removesuffix(".weight")
    modules = tuple(module_of(read) for read in target.reads)
    weight = _weight(target, fmt, modules, partners)
    found = [weight]
    for scale in scale_tensors(fmt, (out, inner), target.dtype):
        name = f"{linear}.{scale.suffix}"
        if scale.origin == "weight":
            found.append(Target(name, scale.dtype, (*experts, *scale.shape), scale=PackedScale(weight.name)))
        else:
            found.append(_artifact_target(name, scale, target, weight, partners, num_ranks))
    return tuple(found)


def module_of(read: Read) -> str:
    """Return the source module whose weight a read takes. A part of a tensor of all experts is named by expert and first row."""
    return read.tensor.name.removesuffix(".weight") if read.rows is None else f"{read.name}.{read.rows.first}"


class ExpertPart(NamedTuple):
    """Part of a tensor of all experts, as `module_of` names it."""

    tensor: str
    expert: int
    first_row: int


def expert_part(module: str) -> ExpertPart | None:
    """Return the part of a tensor of all experts that a source module is; None: it has a tensor of its own."""
    found = _EXPERT_PART.fullmatch(module)
    return ExpertPart(found[1], int(found[2]), int(found[3])) if found else None


def is_of_expert(module: str) -> bool:
    """Whether a source module is a linear of an expert that the router chooses."""
    return ".experts." in module or expert_part(module) is not None


def _weight(target: Target, fmt: LinearFormat, modules: tuple[str, ...], partners: Sequence[str]) -> Target:
    *experts, out, inner = target.shape
    dtype, shape = packed(fmt, (out, inner))
    # The reads of one expert are joined, and so are all reads of a dense linear.
    joined = len(modules) // num_experts(target)
    amax = tuple(
        tuple(dict.fromkeys((*modules[start : start + joined], *partners)))
        for start in range(0, len(modules), joined)
        for _ in range(joined)
    )
    return replace(target, dtype=dtype, shape=(*experts, *shape), quantized=QuantizedWeight(fmt, target.dtype, modules, amax))


def num_experts(target: Target) -> int:
    """Return the number of experts of the whole layer; 1 for a dense linear."""
    if len(target.shape) == 2:
        return 1
    rows = target.shape[1]
    joined, height = 0, 0
    while height < rows:
        height += _height(target.reads[joined])
        joined += 1
    return len(target.reads) // joined


def _height(read: Read) -> int:
    return read.spans[0].length if read.axis == 0 else read.shape[0]


def _artifact_target(
    name: str, scale: ScaleTensor, target: Target, weight: Target, partners: Sequence[str], num_ranks: int
) -> Target:
    assert weight.quantized is not None
    everything = tuple(dict.fromkeys((*weight.quantized.modules, *partners)))
    if scale.origin == "weight_amax" and len(target.shape) == 3:
        entries = tuple(_expert_entries(weight, rank) for rank in range(num_ranks))
        shape: tuple[int, ...] = (target.shape[0], *scale.shape)
    else:
        modules = weight.quantized.modules if scale.origin == "pre_quant_scale" else everything
        entries, shape = ((modules,),) * num_ranks, scale.shape
    spans = _input_spans(target, num_ranks) if scale.origin == "pre_quant_scale" else ()
    return Target(name, scale.dtype, shape, scale=ArtifactScale((scale.origin,), entries, scale.divisor, spans))


def _expert_entries(weight: Target, rank: int) -> tuple[tuple[str, ...], ...]:
    """Return the fused modules of each expert that `rank` holds."""
    assert weight.quantized is not None
    mine = [group for read, group in zip(weight.reads, weight.quantized.amax_modules, strict=True) if rank in read.ranks]
    return tuple(dict.fromkeys(mine))


def _input_spans(target: Target, num_ranks: int) -> tuple[Span, ...]:
    """Return the span of each rank on a vector over the input features; empty: the whole vector."""
    if target.reads[0].axis != 1:
        return ()
    found = []
    for rank in range(num_ranks):
        read = next(item for item in target.reads if not item.ranks or rank in item.ranks)
        found.append(read.spans[read.ranks.index(rank) if read.ranks else rank])
    return tuple(found)


def kv_cache_targets(qkv: Target, kv_cache: KvCacheFormat, num_ranks: int) -> tuple[Target, ...]:
    """Return the scales of a layer's KV cache, which follow its `attention.qkv.weight` in the rank file."""
    prefix = qkv.name.removesuffix("qkv.weight")
    attention = module_of(qkv.reads[0]).rpartition(".")[0]
    entries = (((attention,),),) * num_ranks
    quantities = (("k_amax",), ("v_amax",), ("k_amax", "v_amax"))
    return tuple(
        Target(prefix + name, "F32", (1,), scale=ArtifactScale(amax, entries, KV_CACHE_MAX[kv_cache]))
        for name, amax in zip(KV_CACHE_SCALES, quantities, strict=True)
    )


def problem(target: Target, fmt: LinearFormat) -> Problem | None:
    """Return the reason why the plain weight `target` cannot be stored in `fmt` on a rank; None: it can."""
    linear = target.name.removesuffix(".weight")
    whole, inner = target.reads[0].shape[1], target.shape[-1]
    block = {WeightFormat.NVFP4: NVFP4_BLOCK, WeightFormat.MXFP8: MXFP8_BLOCK}.get(fmt.weight, fmt.block_size)
    if block and (whole % block or inner % block):
        legal = tuple(size for size in _BLOCKS if math.gcd(whole, inner) % size == 0) if fmt.block_size else None
        return Problem(linear, f"{inner} input features per rank (of {whole}) are not a multiple of the block size {block}", legal)
    if fmt.weight in (WeightFormat.INT4_BLOCK, WeightFormat.INT4_BLOCK_FP8) and any(_is_odd(read) for read in target.reads):
        return Problem(linear, "INT4 packs two output rows into a byte, and a rank has an odd number of rows")
    return None


def _is_odd(read: Read) -> bool:
    if read.axis == 0:
        return any(span.begin % 2 or span.end % 2 or span.pad for span in read.spans)
    return read.shape[0] % 2 == 1


def raise_problems(problems: Sequence[Problem]) -> None:
    """Refuse linears that do not fit their format. Raises QuantizationError, which names the block sizes that fit all."""
    if not problems:
        return
    first = problems[0]
    legal = set(_BLOCKS)
    for item in problems:
        legal &= set(item.legal_blocks or ())
    choices = ", ".join(str(size) for size in sorted(legal))
    advice = f"Set quantization.group_size to one of {choices}" if legal else "Choose another tensor-parallel size"
    raise QuantizationError(
        f"{len(problems)} linears cannot be quantized as asked, e.g. {first.linear}: {first.reason}",
        f"{advice}, or name these linears in quantization.exclude.",
    )
