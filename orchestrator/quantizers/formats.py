"""Packing of weights into stored rows and scales, and unpacking.

Every function works on whole rows [rows, in], so that conversion can pack a weight block by block and cut the result for all
ranks. The arithmetic follows Model Optimizer 0.47's TensorRT-LLM export operation by operation and dtype by dtype, so that the
rank files are bit-identical.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.model.quantization import FP4_MAX, FP8_MAX, MXFP8_BLOCK, NVFP4_BLOCK, LinearFormat, WeightFormat

if TYPE_CHECKING:
    import torch

_TINY = 1.1754943508222875e-38
"""Smallest normal float32, to which an amax is clamped before it becomes a scale."""
_E4M3_TINY = 2.0**-9
"""Smallest positive E4M3 number."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Stored rows of a weight."""

    weight: torch.Tensor
    """uint8 [rows, bytes per row], or [rows / 2, in] where two rows share a byte."""
    scales: torch.Tensor | None
    """Scales [rows] or [rows, blocks], in their stored dtype; None: the calibration artifact has the scale."""


def smoothed(weight: torch.Tensor, smooth: torch.Tensor, own: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Return `weight` [rows, in] as AWQ and SmoothQuant leave it, in the same dtype.

    It is multiplied by `smooth`, and then by own / fused if joined linears had to agree on one pre_quant_scale. All vectors are
    float32 [in].
    """
    dtype = weight.dtype
    once = (weight.float() * smooth).to(dtype)
    return once if bool((own == fused).all()) else (once.float() * own / fused).to(dtype)


def pack_rows(weight: torch.Tensor, fmt: LinearFormat, weight_amax: float | None) -> PackedRows:
    """Pack rows [rows, in]. `weight_amax`: of the whole fused tensor, for formats with a scale per tensor."""
    return _PACKERS[fmt.weight](weight, fmt, weight_amax)


def unpack_rows(stored: torch.Tensor, fmt: LinearFormat, scales: torch.Tensor | None, weight_amax: float | None) -> torch.Tensor:
    """Unpack stored bytes to float32 [rows, in], with the scales and the amax of `pack_rows`."""
    bound = {WeightFormat.NVFP4: FP4_MAX * FP8_MAX}.get(fmt.weight, FP8_MAX)
    second = float(_tensor_scale(weight_amax, bound)[0]) if weight_amax is not None else None
    return _UNPACKERS[fmt.weight](stored, fmt, scales, second)


def _scale(amax: torch.Tensor, bound: float) -> torch.Tensor:
    """Return amax / bound in float32. Rows of zeros get scale 1."""
    positive = amax.where(amax > 0, amax.new_full((), bound))
    return positive.clamp(min=_TINY).float() / bound


def _tensor_scale(amax: float | None, bound: float) -> torch.Tensor:
    import torch

    assert amax is not None, "a format with a scale per tensor needs its weight_amax"
    return torch.tensor([amax], dtype=torch.float32) / bound


def _blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, size)


def _int8_channel(weight: torch.Tensor, _fmt: LinearFormat, _amax: float | None) -> PackedRows:
    import torch

    scales = _scale(weight.abs().amax(dim=1), 127.0)
    stored = (weight / scales[:, None]).round().clamp(-128, 127).to(torch.int8)
    return PackedRows(stored.view(torch.uint8), scales)


def _fp8_channel(weight: torch.Tensor, _fmt: LinearFormat, _amax: float | None) -> PackedRows:
    scales = _scale(weight.abs().amax(dim=1), FP8_MAX)
    return PackedRows(_to_fp8(weight / scales[:, None]), scales)


def _fp8_tensor(weight: torch.Tensor, _fmt: LinearFormat, amax: float | None) -> PackedRows:
    return PackedRows(_to_fp8(weight / _tensor_scale(amax, FP8_MAX).to(weight.device)), None)


def _to_fp8(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def _int4_block(weight: torch.Tensor, fmt: LinearFormat, _amax: float | None) -> PackedRows:
    import torch

    blocks = _blocks(weight, fmt.block_size)
    scales = _scale(blocks.abs().amax(dim=2), 7.0)
    values = (blocks / scales[:, :, None]).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
    nibbles = values.view(torch.uint8) & 0x0F
    return PackedRows(nibbles[0::2] | (nibbles[1::2] << 4), scales)


def _nvfp4(weight: torch.Tensor, _fmt: LinearFormat, amax: float | None) -> PackedRows:
    import torch

    second = _tensor_scale(amax, FP4_MAX * FP8_MAX).to(weight.device)[0]
    blocks = _blocks(weight, NVFP4_BLOCK)
    scales = blocks.abs().amax(dim=2).float() / (FP4_MAX * second)
    scales[scales == 0] = 1.0
    stored_scales = scales.clamp(min=_E4M3_TINY, max=FP8_MAX).to(torch.float8_e4m3fn)
    scaled = blocks / (stored_scales.float() * second)[:, :, None]
    codes = _e2m1_codes(scaled.reshape(weight.shape))
    return PackedRows((codes[:, 1::2] << 4) | codes[:, 0::2], stored_scales)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Return the codes of the nearest E2M1 numbers, ties to the even mantissa: sign bit, then the index in _E2M1."""
    import torch

    bounds = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(_E2M1)], device=values.device)
    size = values.abs()
    codes = torch.searchsorted(bounds, size, out_int32=True)
    # searchsorted rounds a tie down, but it must be rounded up where the lower code is odd.
    for bound in bounds[1::2]:
        codes += size == bound
    return ((values < 0).to(torch.uint8) << 3) + codes.to(torch.uint8)


def _mxfp8(weight: torch.Tensor, _fmt: LinearFormat, _amax: float | None) -> PackedRows:
    import torch

    blocks = _blocks(weight, MXFP8_BLOCK)
    descale = blocks.abs().amax(dim=2).float() / FP8_MAX
    exponent = torch.where(descale > 0, torch.log2(descale), torch.tensor(-127.0, device=weight.device)).ceil().clamp(-127, 127)
    scales = (exponent + 127).to(torch.uint8)
    scaled = (blocks * torch.exp2(127 - scales.float())[:, :, None]).clamp(-FP8_MAX, FP8_MAX)
    return PackedRows(_to_fp8(scaled).reshape(weight.shape), scales)


def _from_fp8(stored: torch.Tensor) -> torch.Tensor:
    import torch

    return stored.view(torch.float8_e4m3fn).float()


def _needed(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None, "the format's scales are missing"
    return value


def _unpack_int8(stored: torch.Tensor, _fmt: LinearFormat, scales: torch.Tensor | None, _second: float | None) -> torch.Tensor:
    import torch

    return stored.view(torch.int8).float() * _needed(scales)[:, None]


def _unpack_fp8_channel(
    stored: torch.Tensor, _fmt: LinearFormat, scales: torch.Tensor | None, _second: float | None
) -> torch.Tensor:
    return _from_fp8(stored) * _needed(scales)[:, None]


def _unpack_fp8_tensor(
    stored: torch.Tensor, _fmt: LinearFormat, _scales: torch.Tensor | None, second: float | None
) -> torch.Tensor:
    assert second is not None
    return _from_fp8(stored) * second


def _unpack_int4(stored: torch.Tensor, fmt: LinearFormat, scales: torch.Tensor | None, _second: float | None) -> torch.Tensor:
    import torch

    rows, inner = stored.shape
    values = torch.stack([stored & 0x0F, stored >> 4], dim=1).reshape(2 * rows, inner).to(torch.int8)
    signed = torch.where(values > 7, values - 16, values).float()
    return (_blocks(signed, fmt.block_size) * _needed(scales)[:, :, None]).reshape(2 * rows, inner)


def _unpack_int4_fp8(stored: torch.Tensor, fmt: LinearFormat, scales: torch.Tensor | None, second: float | None) -> torch.Tensor:
    """Unpack as the engine does: the INT4 weight, rounded to E4M3 with the second scale."""
    assert second is not None
    return _from_fp8(_to_fp8(_unpack_int4(stored, fmt, scales, None) / second)) * second


def _unpack_nvfp4(stored: torch.Tensor, _fmt: LinearFormat, scales: torch.Tensor | None, second: float | None) -> torch.Tensor:
    import torch

    assert second is not None
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=stored.device)
    codes = torch.stack([stored & 0x0F, stored >> 4], dim=2).reshape(stored.shape[0], -1)
    factors = _needed(scales).float() * second
    return (_blocks(table[codes.long()], NVFP4_BLOCK) * factors[:, :, None]).reshape(codes.shape)


def _unpack_mxfp8(stored: torch.Tensor, _fmt: LinearFormat, scales: torch.Tensor | None, _second: float | None) -> torch.Tensor:
    import torch

    factors = torch.exp2(_needed(scales).float() - 127)
    return (_blocks(_from_fp8(stored), MXFP8_BLOCK) * factors[:, :, None]).reshape(stored.shape)


_PACKERS: dict[WeightFormat, Callable[[torch.Tensor, LinearFormat, float | None], PackedRows]] = {
    WeightFormat.INT8_CHANNEL: _int8_channel,
    WeightFormat.INT4_BLOCK: _int4_block,
    WeightFormat.INT4_BLOCK_FP8: _int4_block,
    WeightFormat.FP8_TENSOR: _fp8_tensor,
    WeightFormat.FP8_CHANNEL: _fp8_channel,
    WeightFormat.NVFP4: _nvfp4,
    WeightFormat.MXFP8: _mxfp8,
}
_UNPACKERS: dict[WeightFormat, Callable[[torch.Tensor, LinearFormat, torch.Tensor | None, float | None], torch.Tensor]] = {
    WeightFormat.INT8_CHANNEL: _unpack_int8,
    WeightFormat.INT4_BLOCK: _unpack_int4,
    WeightFormat.INT4_BLOCK_FP8: _unpack_int4_fp8,
    WeightFormat.FP8_TENSOR: _unpack_fp8_tensor,
    WeightFormat.FP8_CHANNEL: _unpack_fp8_channel,
    WeightFormat.NVFP4: _unpack_nvfp4,
    WeightFormat.MXFP8: _unpack_mxfp8,
}
