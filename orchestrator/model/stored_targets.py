"""Targets of weights that keep the format in which the source stores them: codes and scales are cut like plain tensors.

Nothing is calibrated or rounded. Only layouts change: INT4 pairs along the input become pairs of rows, a scale per tensor is
repeated for rows, and power-of-two scales become E4M3 with one more power of two per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.base.dtypes import num_bytes
from orchestrator.model.checkpoint import Encoding, Packing, Stored, TensorInfo, View
from orchestrator.model.quantization import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    ActivationFormat,
    LinearFormat,
    ScaleTensor,
    WeightFormat,
    packed,
    scale_tensors,
)
from orchestrator.model.quantized_targets import num_experts
from orchestrator.model.rules import Span
from orchestrator.model.targets import Read, StoredScale, Target

_E8M0 = ("U8", "F8_E8M0")
_INT4_BLOCKS = (16, 32, 64, 128, 256)


def stored_format(target: Target, activation_limit: float | None = None) -> LinearFormat | None:
    """Return the format in which a linear keeps the source's weights; None: they have no counterpart, or differ.

    `activation_limit`: bound of activations that the source names, for formats with a scale per token. Joined weights in FP8 have
    a scale per tensor each, so the linear has one per row.
    """
    found = {_format(_of_expert(read).tensor, activation_limit) for read in target.reads}
    fmt = found.pop() if len(found) == 1 else None
    if fmt is not None and fmt.weight is WeightFormat.FP8_TENSOR and len(target.reads) > num_experts(target):
        return fmt.model_copy(update={"weight": WeightFormat.FP8_CHANNEL})
    return fmt


def _format(tensor: TensorInfo, limit: float | None) -> LinearFormat | None:
    encoding = tensor.encoding
    if encoding is None or encoding.packing not in (Packing.BYTES, Packing.NIBBLES, Packing.ROW_PAIRS):
        return None
    if any(part is not None for part in (encoding.zero, encoding.groups, encoding.columns)):
        return None
    match encoding.number:
        case "E4M3":
            return _fp8(tensor, encoding, limit)
        case "E2M1":
            if encoding.second is not None and encoding.input_scale is not None:
                return LinearFormat(
                    algorithm="NVFP4",
                    weight=WeightFormat.NVFP4,
                    activation=ActivationFormat.NVFP4,
                    block_size=NVFP4_BLOCK,
                    fuse_gate=True,
                )
            return LinearFormat(algorithm="W4A16_NVFP4", weight=WeightFormat.NVFP4, block_size=NVFP4_BLOCK)
        case "S4" | "U4":
            if encoding.block[0] != 1 or encoding.block[1] not in _INT4_BLOCKS:
                return None
            return LinearFormat(algorithm="W4A16", weight=WeightFormat.INT4_BLOCK, block_size=encoding.block[1])
        case _:
            return None


def _fp8(tensor: TensorInfo, encoding: Encoding, limit: float | None) -> LinearFormat | None:
    if encoding.scale.dtype in _E8M0:
        if encoding.block != (1, MXFP8_BLOCK):
            return None
        return LinearFormat(algorithm="MXFP8", weight=WeightFormat.MXFP8, activation=ActivationFormat.MXFP8, block_size=MXFP8_BLOCK)
    is_whole = encoding.block == tensor.shape and len(encoding.scale.shape) < 2  # not a grid of one block
    if is_whole and encoding.input_scale is not None:
        return LinearFormat(algorithm="FP8", weight=WeightFormat.FP8_TENSOR, activation=ActivationFormat.FP8_TENSOR, fuse_gate=True)
    if is_whole or encoding.block == (1, tensor.shape[1]):
        return LinearFormat(
            algorithm="FP8_PER_CHANNEL_PER_TOKEN",
            weight=WeightFormat.FP8_CHANNEL,
            activation=ActivationFormat.FP8_TOKEN,
            activation_limit=limit,
        )
    return None


def stored(target: Target, fmt: LinearFormat, num_ranks: int) -> tuple[Target, ...]:
    """Return the weight and scales that replace the plain weight `target`, [out, in] or [experts, out, in]."""
    target = replace(target, reads=tuple(map(_of_expert, target.reads)))
    *experts, out, inner = target.shape
    linear = target.name.removesuffix(".weight")
    dtype, shape = packed(fmt, (out, inner))
    peers = _peers(target)
    rows = 2 if fmt.weight is WeightFormat.INT4_BLOCK else 1
    codes = tuple(_moved(read, _codes(read.tensor, fmt), rows) for read in target.reads)
    found = [Target(target.name, dtype, (*experts, *shape), codes)]
    for scale in scale_tensors(fmt, (out, inner), target.dtype):
        name = f"{linear}.{scale.suffix}"
        if scale.origin == "weight":
            reads = tuple(_moved(read, _scales(read.tensor, fmt, peers[number]), 1) for number, read in enumerate(target.reads))
            found.append(Target(name, scale.dtype, (*experts, *scale.shape), reads))
        else:
            found.append(_number(name, scale, target, fmt, peers, num_ranks))
    return tuple(found)


def _peers(target: Target) -> list[tuple[Stored, ...]]:
    """Return the scales of the weights that are joined with each read, its own included."""
    joined = len(target.reads) // num_experts(target)
    encodings = [read.tensor.encoding for read in target.reads]
    scales = [encoding.scale for encoding in encodings if encoding is not None]
    return [tuple(scales[start : start + joined]) for start in range(0, len(scales), joined) for _ in range(joined)]


def _of_expert(read: Read) -> Read:
    """Return a read of one expert's matrix, [out, in] as it is stored, in place of one of all experts, [experts, in, out]."""
    encoding, rows = read.tensor.encoding, read.rows
    if encoding is None or encoding.packing is not Packing.EXPERTS or rows is None:
        return read
    _, inner, out = read.tensor.shape
    expert = replace(
        encoding,
        packing=Packing.NIBBLES,
        codes=_slice(encoding.codes, rows.expert, (out, inner // 2)),
        scale=_slice(encoding.scale, rows.expert, (out, inner // encoding.block[1])),
    )
    name, dtype, codes = f"{read.tensor.name}.{rows.expert}", read.tensor.dtype, expert.codes
    size = num_bytes(dtype, out * inner)
    tensor = TensorInfo(name, dtype, (out, inner), codes.file, codes.offset, size, None, expert)
    return replace(read, tensor=tensor, rows=replace(rows, expert=0, transposed=False))


def _slice(part: Stored, expert: int, shape: tuple[int, int]) -> Stored:
    """Return an expert's part of a stored tensor of all experts."""
    return Stored(part.dtype, shape, part.file, part.offset + expert * num_bytes(part.dtype, math.prod(shape)))


def _moved(read: Read, tensor: TensorInfo, rows: int) -> Read:
    """Return a read of `tensor`, which holds the read's weight with `rows` of its rows per row and fewer or no columns."""
    inner, width = read.tensor.shape[-1], tensor.shape[-1]
    if read.rows is not None:  # rows are chosen from a tensor of all experts: here of one
        tensor = replace(tensor, shape=(1, *tensor.shape))
    if read.axis is None:
        return replace(read, tensor=tensor)
    if read.axis == 0:
        spans = tuple(Span(span.begin // rows, span.end // rows, span.pad // rows) for span in read.spans)
        return replace(read, tensor=tensor, spans=spans)
    if len(tensor.shape) == 1:
        return replace(read, tensor=tensor, axis=None, spans=())
    spans = tuple(Span(span.begin * width // inner, span.end * width // inner) for span in read.spans)
    return replace(read, tensor=tensor, spans=spans)


def _encoding(tensor: TensorInfo) -> Encoding:
    assert tensor.encoding is not None  # `stored_format` saw it
    return tensor.encoding


def _plain(name: str, part: Stored, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, dtype, shape, part.file, part.offset, num_bytes(dtype, math.prod(shape)))


def _viewed(name: str, encoding: Encoding, view: View, dtype: str, shape: tuple[int, ...], peers: tuple[Stored, ...]) -> TensorInfo:
    """Return a tensor that the reader makes of an encoding's codes or scales."""
    seen, codes = replace(encoding, view=view, peers=peers, input_scale=None), encoding.codes
    return TensorInfo(name, dtype, shape, codes.file, codes.offset, num_bytes(dtype, math.prod(shape)), None, seen)


def _codes(tensor: TensorInfo, fmt: LinearFormat) -> TensorInfo:
    """Return the codes of a weight as a rank file holds them before it is cut."""
    encoding = _encoding(tensor)
    dtype, shape = packed(fmt, (tensor.shape[0], tensor.shape[1]))
    if encoding.packing is Packing.NIBBLES and fmt.weight is WeightFormat.INT4_BLOCK:
        return _viewed(tensor.name, encoding, View.ROW_PAIRS, dtype, shape, ())
    return _plain(tensor.name, encoding.codes, dtype, shape)


def _scales(tensor: TensorInfo, fmt: LinearFormat, peers: tuple[Stored, ...]) -> TensorInfo:
    """Return the scales of a weight, per row or per block."""
    encoding, name = _encoding(tensor), f"{tensor.name}.scale"
    rows, inner = tensor.shape
    part = encoding.scale
    if fmt.weight is WeightFormat.FP8_CHANNEL:
        if encoding.block[0] == 1:
            return _plain(name, part, part.dtype, (rows,))
        return _viewed(name, encoding, View.ROW_SCALES, "F32", (rows,), ())
    if fmt.weight is WeightFormat.NVFP4 and encoding.second is None:
        return _viewed(name, encoding, View.E4M3_SCALES, "F8_E4M3", (rows, inner // NVFP4_BLOCK), peers)
    return _plain(name, part, "U8" if part.dtype == "F8_E8M0" else part.dtype, (rows, inner // encoding.block[1]))


def _number(
    name: str, scale: ScaleTensor, target: Target, fmt: LinearFormat, peers: Sequence[tuple[Stored, ...]], num_ranks: int
) -> Target:
    """Return a scale of a whole tensor, of its weight or of its input, with one entry per expert for weights."""
    is_input = scale.origin == "input_amax"
    numbers = [_number_of(read.tensor, fmt, is_input, peers[at]) for at, read in enumerate(target.reads)]
    divides = any(_encoding(read.tensor).divides for read in target.reads)
    joined = len(numbers) // num_experts(target)
    shape = scale.shape
    if is_input or len(target.shape) == 2:
        entries: tuple[tuple[tuple[TensorInfo, ...], ...], ...] = ((_entry(numbers),),) * num_ranks
    else:
        shape = (target.shape[0], *scale.shape)
        starts = range(0, len(numbers), joined)
        entries = tuple(
            tuple(
                _entry(numbers[start : start + joined])
                for start in starts
                if not target.reads[start].ranks or rank in target.reads[start].ranks
            )
            for rank in range(num_ranks)
        )
    return Target(name, scale.dtype, shape, scale=StoredScale(entries, must_agree=not is_input, divides=divides))


def _entry(numbers: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the distinct numbers of joined weights; one, if the reader makes it of the scales of all of them."""
    return tuple(numbers[:1] if numbers[0].encoding is not None else dict.fromkeys(numbers))


def _number_of(tensor: TensorInfo, fmt: LinearFormat, is_input: bool, peers: tuple[Stored, ...]) -> TensorInfo:
    """Return the stored number that is, or determines, a linear's scale of the whole tensor."""
    encoding = _encoding(tensor)
    part = encoding.input_scale if is_input else encoding.scale if fmt.weight is WeightFormat.FP8_TENSOR else encoding.second
    name = f"{tensor.name}.{'input_scale' if is_input else 'tensor_scale'}"
    if part is None:  # powers of two per block
        return _viewed(name, encoding, View.E4M3_SECOND, "F32", (1,), peers)
    return _plain(name, part, part.dtype, (1,))
