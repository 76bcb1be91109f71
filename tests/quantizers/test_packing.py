from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import QuantizationError
from orchestrator.model.checkpoint import TensorInfo
from orchestrator.model.quantization import LinearFormat, WeightFormat, packed, scale_tensors
from orchestrator.model.rules import Span
from orchestrator.model.targets import PackedScale, QuantizedWeight, Read, Target
from orchestrator.quantizers import QUANTIZERS
from orchestrator.quantizers.formats import pack_rows, smoothed, unpack_rows
from orchestrator.work.convert.packing import Packer
from orchestrator.work.scales import Scales

MODULE = "model.layers.0.mlp.up_proj"
TARGET = "transformer.layers.0.mlp.gate.weight"
FORMATS = {
    fmt.weight: fmt.model_copy(update={"block_size": 32 if fmt.block_size == 128 else fmt.block_size, "pre_quant_scale": False})
    for fmt in (quantizer.linear for quantizer in QUANTIZERS.values())
}
RELATIVE_ERRORS = {
    WeightFormat.INT8_CHANNEL: 0.01,
    WeightFormat.INT4_BLOCK: 0.12,
    WeightFormat.INT4_BLOCK_FP8: 0.13,
    WeightFormat.FP8_TENSOR: 0.03,
    WeightFormat.FP8_CHANNEL: 0.03,
    WeightFormat.NVFP4: 0.11,
    WeightFormat.MXFP8: 0.03,
}
"""Of a normal weight: measured 0.009, 0.11, 0.11, 0.027, 0.027, 0.095, 0.027."""


def weight(rows: int, inner: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, inner, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("kind", FORMATS)
def test_pack_rows_unpacked_is_near_the_weight(kind: WeightFormat) -> None:
    rows = weight(64, 256)
    amax = float(rows.abs().max())
    found = pack_rows(rows, FORMATS[kind], amax)
    back = unpack_rows(found.weight, FORMATS[kind], found.scales, amax)
    assert float((back - rows.float()).norm() / rows.float().norm()) < RELATIVE_ERRORS[kind]


@pytest.mark.parametrize("kind", FORMATS)
def test_pack_rows_has_the_size_that_the_plan_says(kind: WeightFormat) -> None:
    fmt = FORMATS[kind]
    found = pack_rows(weight(16, 128), fmt, 4.0)
    _, shape = packed(fmt, (16, 128))
    assert found.weight.numel() == np.prod(shape)
    for scale in scale_tensors(fmt, (16, 128), "BF16"):
        if scale.origin == "weight":
            assert found.scales is not None
            assert tuple(found.scales.shape) == scale.shape


@pytest.mark.parametrize("kind", FORMATS)
def test_pack_rows_zeros_come_back_as_zeros(kind: WeightFormat) -> None:
    found = pack_rows(torch.zeros(4, 64, dtype=torch.bfloat16), FORMATS[kind], 1.0)
    assert not unpack_rows(found.weight, FORMATS[kind], found.scales, 1.0).any()


def test_pack_rows_int4_puts_the_even_row_in_the_low_nibble() -> None:
    fmt = FORMATS[WeightFormat.INT4_BLOCK]
    rows = torch.zeros(2, 32)
    rows[0, :2], rows[1, :2] = torch.tensor([7.0, 3.0]), torch.tensor([-7.0, -1.0])
    assert pack_rows(rows, fmt, None).weight[0, :2].tolist() == [0x97, 0xF3]


def test_pack_rows_nvfp4_rounds_ties_to_the_even_number() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0])
    found = pack_rows(ties[None], FORMATS[WeightFormat.NVFP4], 6.0 * 448.0)
    back = unpack_rows(found.weight, FORMATS[WeightFormat.NVFP4], found.scales, 6.0 * 448.0)
    assert back[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert back[0, 8:].abs().tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_smoothed_agreed_scale_moves_the_weight_a_second_time() -> None:
    rows = weight(4, 8)
    smooth, own, fused = torch.full((8,), 0.5), torch.full((8,), 2.0), torch.full((8,), 4.0)
    assert torch.equal(smoothed(rows, smooth, own, own), rows * 0.5)
    assert torch.equal(smoothed(rows, smooth, own, fused), rows * 0.25)


CutCase = tuple[LinearFormat, int, int, int, int | None, list[int]]


@st.composite
def cuts(draw: st.DrawFn) -> CutCase:
    """A format, rows, input features, ranks, the axis that is cut, and the rows at which blocks end."""
    fmt = FORMATS[draw(st.sampled_from(list(FORMATS)))]
    ranks, axis = draw(st.integers(1, 3)), draw(st.sampled_from([None, 0, 1]))
    rows = 2 * draw(st.integers(1, 6)) * (ranks if axis == 0 else 1)
    inner = 32 * draw(st.integers(1, 3)) * (ranks if axis == 1 else 1)
    ends = sorted({2 * end for end in draw(st.lists(st.integers(1, rows // 2), max_size=3))} | {rows})
    return fmt, rows, inner, ranks, axis, ends


@settings(max_examples=60, deadline=None)
@given(cut=cuts())
def test_packer_blocks_cut_for_ranks_join_to_the_whole_packed(
    cut: tuple[LinearFormat, int, int, int, int | None, list[int]],
) -> None:
    fmt, rows, inner, ranks, axis, ends = cut
    whole = weight(rows, inner, seed=rows * inner)
    amax = np.float32(float(whole.abs().max()))
    target = _target(fmt, rows, inner, ranks, axis)
    packer = Packer(ranks, Scales({f"{MODULE}.weight_amax": np.array(amax)}))
    stored: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for rank, piece in _packed(packer, target, whole, ends):
        stored[rank].append(piece)
    expected = pack_rows(whole, fmt, float(amax))
    sizes = expected.weight.shape
    joined = [np.concatenate(pieces) for pieces in stored]
    assert np.array_equal(_join(joined, axis), as_bytes(expected.weight))
    assert all(part.shape[0] == sizes[0] // (ranks if axis == 0 else 1) for part in joined)
    if expected.scales is not None:
        scales = [np.frombuffer(data, np.uint8) for data in packer.scales_of(_scale_of(target))]
        flat = as_bytes(expected.scales.reshape(rows, -1))
        parts = [part.reshape(rows // (ranks if axis == 0 else 1), -1) for part in scales]
        if axis == 1 and expected.scales.dim() == 1:
            assert all(np.array_equal(part, flat) for part in parts)
        else:
            assert np.array_equal(_join(parts, axis), flat)


def _target(fmt: LinearFormat, rows: int, inner: int, ranks: int, axis: int | None) -> Target:
    size = (rows, inner)[axis] // ranks if axis is not None else 0
    spans = tuple(Span(rank * size, (rank + 1) * size) for rank in range(ranks)) if axis is not None else ()
    read = Read(TensorInfo(f"{MODULE}.weight", "BF16", (rows, inner), 0, 0, rows * inner * 2), axis, spans)
    return Target(TARGET, "U8", (1,), (read,), QuantizedWeight(fmt, "BF16", (MODULE,), ((MODULE,),)))


def _scale_of(target: Target) -> Target:
    return Target("scale", "F32", (1,), scale=PackedScale(target.name))


def _packed(packer: Packer, target: Target, whole: torch.Tensor, ends: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    begin = 0
    for end in ends:
        yield from ((rank, np.array(piece)) for rank, piece in packer.pack(target, 0, begin, as_bytes(whole[begin:end])))
        begin = end


def _join(parts: list[np.ndarray], axis: int | None) -> np.ndarray:
    if axis is None:
        assert all(np.array_equal(part, parts[0]) for part in parts)
        return parts[0]
    return np.concatenate(parts, axis=axis)


def test_packer_artifact_without_the_module_is_refused_by_name() -> None:
    target = _target(FORMATS[WeightFormat.FP8_TENSOR], 4, 32, 1, None)
    with pytest.raises(QuantizationError, match=f"has no {MODULE}.weight_amax"):
        list(Packer(1, Scales({})).pack(target, 0, 0, as_bytes(weight(4, 32))))


def test_packer_errors_are_relative_to_the_weight_and_named_globally() -> None:
    fmt = FORMATS[WeightFormat.INT8_CHANNEL]
    packer = Packer(1, None)
    list(packer.pack(_target(fmt, 64, 64, 1, None), 0, 0, as_bytes(weight(64, 64))))
    assert list(packer.errors()) == ["transformer.layers.0.mlp.gate"]
    assert 0.005 < packer.errors()["transformer.layers.0.mlp.gate"] < 0.01
