"""Quantized sources: every format's values are those of the library that defines it, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from orchestrator.base.errors import OrchestratorError, QuantizationError, SourceCorruptError
from orchestrator.checkpoints import read_source
from tests.support.quantized import dense, same_bits, write_quantized

NAME = "model.layers.0.mlp.up_proj"
STEPS = [1000, 7, 1]
"""Rows at a time: all, off every block, one."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def e4m3(*shape: int, seed: int = 1) -> torch.Tensor:
    """Every finite E4M3 number, in a random order."""
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, torch.zeros_like(codes), codes).view(torch.float8_e4m3fn)


def codes(high: int, *shape: int, seed: int = 2, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def words(*shape: int, seed: int = 3) -> torch.Tensor:
    """Random 32-bit words."""
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int32)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_block_fp8_equals_transformers(tmp_path: Path, step: int, dtype: str) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = e4m3(256, 384), normal(2, 3).abs() * 1e-3
    source = write_quantized(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scale}, FP8)
    wanted = getattr(torch, {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype])
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, wanted)
    assert same_bits(dense(source, step, dtype)[f"{NAME}.weight"], expected)


@pytest.mark.parametrize("step", STEPS)
def test_block_fp8_with_ragged_blocks_equals_a_scale_per_element(tmp_path: Path, step: int) -> None:
    """DeepSeek's 576 rows: transformers refuses them, DeepSeek's own kernel does not."""
    weight, scale = e4m3(200, 300), normal(2, 3).abs()
    source = write_quantized(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scale}, FP8)
    each = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert same_bits(dense(source, step)[f"{NAME}.weight"], (weight.float() * each).bfloat16())


def test_block_fp8_with_exponents_for_scales_equals_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = e4m3(256, 128), codes(12, 2, 1).add(115).view(torch.float8_e8m0fnu)
    quantization = {**FP8, "scale_fmt": "ue8m0"}
    source = write_quantized(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scale}, quantization)
    assert same_bits(dense(source)[f"{NAME}.weight"], Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_per_tensor_equals_transformers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = e4m3(24, 40), torch.full(shape, 0.0123)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scale, f"{NAME}.activation_scale": torch.tensor(2.0)}
    quantization = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    source = write_quantized(tmp_path, tensors, quantization)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale.reshape(()), torch.bfloat16)
    assert same_bits(dense(source, 7)[f"{NAME}.weight"], expected)
    assert list(read_source(str(source))[0].left_out) == [f"{NAME}.activation_scale"]


@pytest.mark.parametrize("step", STEPS)
def test_fbgemm_fp8_equals_a_scale_per_row(tmp_path: Path, step: int) -> None:
    weight, scale = e4m3(24, 40), normal(24, 1).abs()
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale, f"{NAME}.input_scale_ub": torch.tensor([1200.0])}
    source = write_quantized(tmp_path, tensors, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    assert same_bits(dense(source, step)[f"{NAME}.weight"], (weight.float() * scale).bfloat16())


@pytest.mark.parametrize("step", [1000, 2, 1])
def test_mxfp4_experts_equal_transformers(tmp_path: Path, step: int) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = codes(256, 5, 24, 3, 16), codes(20, 5, 24, 3).add(118)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": normal(5, 24).bfloat16()}
    source = write_quantized(tmp_path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    found = dense(source, step)
    assert same_bits(found[name], convert_moe_packed_tensors(blocks, scales))
    assert found[name].shape == (5, 96, 24)
    assert f"{name}_bias" in found


def compressed(args: dict[str, Any], form: str, activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """A quantization_config of one group."""
    group = {"targets": ["Linear"], "weights": args, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def decompressed(form: str, tensors: dict[str, torch.Tensor], args: dict[str, Any]) -> torch.Tensor:
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    return BaseCompressor.get_value_from_registry(form).decompress(tensors, scheme)["weight"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 32), (8, None)])
def test_compressed_pack_quantized_equals_compressed_tensors(
    tmp_path: Path, step: int, symmetric: bool, bits: int, group: int | None
) -> None:
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    args |= {"group_size": group} if group else {}
    half, groups = 1 << (bits - 1), 96 // group if group else 1
    tensors = {
        "weight_packed": pack_to_int32(codes(2 * half, 24, 96, dtype=torch.int16).sub(half).to(torch.int8), bits),
        "weight_scale": (normal(24, groups).abs() * 0.01).bfloat16(),
        "weight_shape": torch.tensor([24, 96]),
    }
    if not symmetric:
        zero = codes(2 * half, 24, groups, seed=5, dtype=torch.int16).sub(half).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0).contiguous()
    named = {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}
    source = write_quantized(tmp_path, named, compressed(args, "pack-quantized"))
    assert same_bits(dense(source, step)[f"{NAME}.weight"], decompressed("pack-quantized", tensors, args))


def test_compressed_pack_quantized_row_that_does_not_fill_a_word(tmp_path: Path) -> None:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 12}
    tensors = {
        "weight_packed": pack_to_int32(codes(16, 8, 36, dtype=torch.int8).sub(8), 4),
        "weight_scale": normal(8, 3).bfloat16(),
        "weight_shape": torch.tensor([8, 36]),
    }
    source = write_quantized(
        tmp_path, {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}, compressed(args, "pack-quantized")
    )
    assert same_bits(dense(source, 3)[f"{NAME}.weight"], decompressed("pack-quantized", tensors, args))


@pytest.mark.parametrize(
    ("strategy", "shape"), [("tensor", (1,)), ("channel", (256, 1)), ("block", (2, 3))], ids=["tensor", "row", "block"]
)
def test_compressed_fp8_equals_compressed_tensors(tmp_path: Path, strategy: str, shape: tuple[int, ...]) -> None:
    args: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    args |= {"block_structure": [128, 128]} if strategy == "block" else {}
    tensors = {"weight": e4m3(256, 384), "weight_scale": (normal(*shape).abs() * 0.01).bfloat16()}
    named = {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}
    source = write_quantized(tmp_path, named, compressed(args, "float-quantized"))
    assert same_bits(dense(source, 7)[f"{NAME}.weight"], decompressed("float-quantized", tensors, args))


def test_compressed_int8_equals_compressed_tensors(tmp_path: Path) -> None:
    args: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel"}
    tensors = {"weight": codes(256, 24, 40, dtype=torch.int16).sub(128).to(torch.int8), "weight_scale": normal(24, 1).bfloat16()}
    named = {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}
    source = write_quantized(tmp_path, named, compressed(args, "int-quantized"))
    assert same_bits(dense(source, 7)[f"{NAME}.weight"], decompressed("int-quantized", tensors, args))


@pytest.mark.parametrize("step", STEPS)
def test_compressed_nvfp4_equals_compressed_tensors(tmp_path: Path, step: int) -> None:
    args: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    tensors = {
        "weight_packed": codes(256, 24, 48),
        "weight_scale": normal(24, 6).abs().mul(100).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([1234.5]),
    }
    named = {f"{NAME}.{name}": tensor for name, tensor in tensors.items()} | {f"{NAME}.input_global_scale": torch.tensor([3.0])}
    source = write_quantized(tmp_path, named, compressed(args, "nvfp4-pack-quantized"))
    assert same_bits(dense(source, step)[f"{NAME}.weight"], decompressed("nvfp4-pack-quantized", tensors, args))


@pytest.mark.parametrize("form", ["mxfp4-pack-quantized", "mxfp8-quantized"])
def test_compressed_microscaling_equals_compressed_tensors(tmp_path: Path, form: str) -> None:
    bits = 4 if "4" in form else 8
    args: dict[str, Any] = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32}
    weight = {"weight_packed": codes(256, 24, 48)} if bits == 4 else {"weight": e4m3(24, 96)}
    tensors = {**weight, "weight_scale": codes(12, 24, 3).add(118)}
    named = {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}
    source = write_quantized(tmp_path, named, compressed(args, form))
    assert same_bits(dense(source, 7)[f"{NAME}.weight"], decompressed(form, tensors, args).bfloat16())


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], "producer": {"name": "modelopt"}, **more}


def test_modelopt_nvfp4_equals_model_optimizer(tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scale, second = codes(256, 24, 48), normal(24, 6).abs().mul(100).to(torch.float8_e4m3fn), torch.tensor(0.00123)
    tensors = {f"{NAME}.weight": packed, f"{NAME}.weight_scale": scale, f"{NAME}.weight_scale_2": second}
    source = write_quantized(tmp_path, tensors | {f"{NAME}.input_scale": torch.tensor(1.0)}, modelopt("NVFP4", group_size=16))
    expected = NVFP4QTensor(torch.Size((24, 96)), torch.bfloat16, packed).dequantize(
        scale=scale, double_scale=second, block_sizes={-1: 16}
    )
    found = dense(source, 7)[f"{NAME}.weight"]
    assert torch.equal(found, expected)  # but for the sign of zeros, which Model Optimizer drops
    assert same_bits(found + 0, expected + 0)


def test_modelopt_int4_awq_is_the_pairs_of_rows_times_scales_times_factors(tmp_path: Path) -> None:
    packed, scale, factors = codes(256, 12, 64), normal(24, 2).abs() * 0.1, normal(64).abs().bfloat16()
    tensors = {f"{NAME}.weight": packed, f"{NAME}.weight_scale": scale, f"{NAME}.pre_quant_scale": factors}
    source = write_quantized(tmp_path, tensors, modelopt("W4A16_AWQ"))
    signed = torch.empty(24, 64)
    for row in range(24):
        nibbles = (packed[row // 2] >> (4 * (row % 2))) & 15
        signed[row] = torch.where(nibbles > 7, nibbles.int() - 16, nibbles.int()).float()
    expected = (signed * scale.repeat_interleave(32, 1) * factors.float()).bfloat16()
    for step in (1000, 6):
        assert same_bits(dense(source, step)[f"{NAME}.weight"], expected), step


@pytest.mark.parametrize(("algorithm", "shape"), [("FP8", ()), ("FP8_PER_CHANNEL_PER_TOKEN", (256,)), ("FP8_PB_WO", (2, 1, 3, 1))])
def test_modelopt_fp8_is_a_scale_per_tensor_row_or_block(tmp_path: Path, algorithm: str, shape: tuple[int, ...]) -> None:
    weight, scale = e4m3(256, 384), normal(*shape).abs()
    source = write_quantized(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}, modelopt(algorithm))
    each = {0: scale, 1: scale.reshape(-1, 1)}.get(len(shape))
    if each is None:
        each = scale.reshape(2, 3).repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert same_bits(dense(source, 7)[f"{NAME}.weight"], (weight.float() * each).bfloat16())


def test_modelopt_int8_smoothquant_is_a_scale_per_row_times_factors(tmp_path: Path) -> None:
    weight, scale, factors = codes(256, 24, 40).view(torch.int8), normal(24).abs(), normal(40).abs()
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale, f"{NAME}.pre_quant_scale": factors}
    source = write_quantized(tmp_path, tensors, modelopt("W8A8_SQ_PER_CHANNEL"))
    assert same_bits(dense(source, 7)[f"{NAME}.weight"], (weight.float() * scale[:, None] * factors).bfloat16())


def test_modelopt_mxfp8_equals_model_optimizer(tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import MXFP8QTensor

    weight, scale = e4m3(24, 96), codes(12, 24, 3).add(118)
    source = write_quantized(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}, modelopt("MXFP8", group_size=32))
    expected = MXFP8QTensor(torch.Size((24, 96)), torch.bfloat16, weight).dequantize(scale=scale)
    assert same_bits(dense(source, 7)[f"{NAME}.weight"], expected)


def test_modelopt_mixed_precision_reads_each_module_as_it_is_stored(tmp_path: Path) -> None:
    other = NAME.replace("up", "down")
    weight, packed, scale = e4m3(24, 40), codes(256, 12, 64), normal(24, 2).abs()
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": torch.tensor(0.5)}
    tensors |= {f"{other}.weight": packed, f"{other}.weight_scale": scale}
    layers = {NAME: {"quant_algo": "FP8"}, other: {"quant_algo": "W4A16_AWQ", "group_size": 32}}
    source = write_quantized(tmp_path, tensors, modelopt("MIXED_PRECISION", quantized_layers=layers))
    found = dense(source)
    assert same_bits(found[f"{NAME}.weight"], (weight.float() * 0.5).bfloat16())
    assert found[f"{other}.weight"].shape == (24, 64)


def test_modelopt_described_by_its_own_file_alone(tmp_path: Path) -> None:
    weight, scale = e4m3(24, 40), torch.tensor(0.5)
    source = write_quantized(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}, {})
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    assert same_bits(dense(source)[f"{NAME}.weight"], (weight.float() * 0.5).bfloat16())


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_is_code_less_zero_times_scale_of_the_features_group(tmp_path: Path, bits: int, desc_act: bool, layout: str) -> None:
    out, inner, per_word = 48, 96, 32 // bits
    weight, zeros = words(inner // per_word, out), words(3, out // per_word, seed=4)
    scale = (normal(3, out).abs() * 0.01).half()
    order = torch.randperm(inner, generator=torch.Generator().manual_seed(1)).div(32, rounding_mode="floor").int()
    groups = order if desc_act else torch.arange(inner).div(32, rounding_mode="floor").int()
    tensors = {f"{NAME}.qweight": weight, f"{NAME}.qzeros": zeros, f"{NAME}.scales": scale, f"{NAME}.g_idx": groups}
    quantization = {**GPTQ, "bits": bits, "desc_act": desc_act, "checkpoint_format": layout}
    source = write_quantized(tmp_path, tensors, quantization, dtype="float16")
    expected = torch.empty(out, inner)
    mask, more = 2**bits - 1, 1 if layout == "gptq" else 0
    for k in range(inner):
        group = int(groups[k])
        code = (weight[k // per_word].long() >> (bits * (k % per_word))) & mask
        zero = torch.stack([(zeros[group, n // per_word].long() >> (bits * (n % per_word))) & mask for n in range(out)])
        expected[:, k] = (code - zero - more).float() * scale[group].float()
    for step in STEPS:
        assert same_bits(dense(source, step)[f"{NAME}.weight"], expected.half()), step


def test_awq_is_code_less_zero_times_scale_with_rows_interleaved_in_words(tmp_path: Path) -> None:
    out, inner = 48, 96
    weight, zeros, scale = words(inner, out // 8), words(3, out // 8, seed=4), (normal(3, out).abs() * 0.01).half()
    tensors = {f"{NAME}.qweight": weight, f"{NAME}.qzeros": zeros, f"{NAME}.scales": scale}
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    source = write_quantized(tmp_path, tensors, quantization, dtype="float16")
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AWQ_ORDER: nibble i of a word holds column order[i]

    def unpacked(packed: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(packed), out)
        for word in range(out // 8):
            for nibble, column in enumerate(order):
                found[:, 8 * word + column] = ((packed[:, word].long() >> (4 * nibble)) & 15).float()
        return found

    each = torch.arange(inner) // 32
    expected = ((unpacked(weight) - unpacked(zeros)[each]) * scale.float()[each]).T.half()
    for step in STEPS:
        assert same_bits(dense(source, step)[f"{NAME}.weight"], expected), step


def refused(source: Path, error: type[OrchestratorError], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        read_source(str(source))


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda found: {**found, f"{NAME}.weight_scale_inv": normal(3, 2)}, r"weight_scale_inv is \[3, 2\], expected is \[2, 3\]"),
        (lambda found: {**found, f"{NAME}.weight_scale_inv": normal(2, 2)}, r"is \[2, 2\], expected is \[2, 3\]"),
        (lambda found: {f"{NAME}.weight": found[f"{NAME}.weight"]}, "it has no scale"),
        (lambda found: {f"{NAME}.weight_scale_inv": normal(2, 3)}, "belongs to no quantized weight"),
        (lambda found: {**found, f"{NAME}.weight": normal(256, 384).bfloat16()}, "belongs to no quantized weight"),
        (lambda found: {**found, f"{NAME}.weight_scale_inv": codes(9, 2, 3)}, "is U8, expected is"),
        (lambda found: {**found, f"{NAME}.weight": codes(9, 256, 384)}, "weights of this quantization are F8_E4M3"),
        (lambda found: {**found, "model.layers.0.extra": e4m3(4, 4)}, "it has no scale"),
        (lambda found: {**found, f"{NAME}.weight_scale": normal(2, 3)}, "are both the scale of"),
    ],
    ids=["transposed", "truncated", "missing", "alone", "of a plain weight", "of another dtype", "other codes", "unknown", "twice"],
)
def test_scales_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: Change, pattern: str) -> None:
    whole = {f"{NAME}.weight": e4m3(256, 384), f"{NAME}.weight_scale_inv": normal(2, 3)}
    refused(write_quantized(tmp_path, change(whole), FP8), SourceCorruptError, pattern)


def test_group_of_an_input_feature_without_a_scale_is_refused(tmp_path: Path) -> None:
    stored = {f"{NAME}.qweight": words(12, 48), f"{NAME}.qzeros": words(3, 6), f"{NAME}.scales": normal(3, 48).half()}
    groups = torch.arange(96).div(30, rounding_mode="floor").int()
    source = write_quantized(tmp_path, {**stored, f"{NAME}.g_idx": groups}, {**GPTQ, "desc_act": True})
    with pytest.raises(SourceCorruptError, match="g_idx holds 0 to 3, there are 3 groups"):
        dense(source)


def test_weight_that_is_there_dense_and_quantized_is_refused(tmp_path: Path) -> None:
    stored = {f"{NAME}.qweight": words(12, 48), f"{NAME}.qzeros": words(3, 6), f"{NAME}.scales": normal(3, 48).half()}
    source = write_quantized(tmp_path, {**stored, f"{NAME}.weight": normal(48, 96).half()}, GPTQ)
    refused(source, SourceCorruptError, "there is another .*up_proj.weight too")


def test_buffers_of_integers_are_left_to_the_family(tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": e4m3(256, 384), f"{NAME}.weight_scale_inv": normal(2, 3), "model.position_ids": torch.arange(4)}
    assert "model.position_ids" in read_source(str(write_quantized(tmp_path, tensors, FP8)))[0].tensors


@pytest.mark.parametrize(
    ("quantization", "pattern"),
    [
        ({**FP8, "weight_block_size": [128]}, "not two numbers"),
        ({**FP8, "activation_scheme": "guessed"}, "activation_scheme is 'guessed'"),
        ({**FP8, "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({**FP8, "rotation": True}, "unknown keys of the quantization: rotation: True"),
        ({"quant_method": "awq", "bits": 3}, "bits is 3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "gptq", "bits": 2}, "bits is 2"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "is 'marlin'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "spqr"}, "an unknown method"),
        (modelopt("W4A8_AWQ"), "quant_algo is 'W4A8_AWQ'; read are FP8"),
        (compressed({"num_bits": 6}, "pack-quantized"), "num_bits is 6"),
        ({**compressed({}, "pack-quantized"), "transform_config": {"x": 1}}, "transform_config"),
        ({**compressed({}, "pack-quantized"), "format": "marlin-24"}, "format is 'marlin-24'"),
    ],
)
def test_descriptions_that_are_not_read_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any], pattern: str) -> None:
    refused(write_quantized(tmp_path, {f"{NAME}.weight": normal(4, 4)}, quantization), QuantizationError, pattern)


def test_weight_that_the_description_excludes_is_refused(tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": e4m3(256, 384), f"{NAME}.weight_scale_inv": normal(2, 3)}
    quantization = {**FP8, "modules_to_not_convert": ["lm_head", "up_proj"]}
    refused(write_quantized(tmp_path, tensors, quantization), SourceCorruptError, "lists it among the modules")


def test_index_shows_the_dense_dtype_and_counts_the_stored_bytes(tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.weight": e4m3(256, 384),
        f"{NAME}.weight_scale_inv": normal(2, 3),
        "model.norm.weight": normal(8).bfloat16(),
    }
    index, _ = read_source(str(write_quantized(tmp_path, tensors, FP8)))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in index.tensors.items()} == {
        f"{NAME}.weight": ("BF16", (256, 384)),
        "model.norm.weight": ("BF16", (8,)),
    }
    assert index.num_bytes == 256 * 384 + 6 * 4 + 16
    assert index.algorithm == "FP8 128x128"
    assert "quantization_config" not in index.config
