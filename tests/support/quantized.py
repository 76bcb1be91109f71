"""Quantized Hugging Face folders: tensors as given, and what the reader makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from orchestrator.base.dtypes import ARRAY_NAMES
from orchestrator.checkpoints import read_source
from orchestrator.checkpoints.reading import RowReader
from orchestrator.stores import open_source


def write_quantized(folder: Path, tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, Any], **config: Any) -> Path:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **config}
    (folder / "config.json").write_text(json.dumps({**plain, "quantization_config": quantization}))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def dense(folder: Path, step: int = 1000, dtype: str | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of the source as it is read, `step` rows at a time; asserts that every stored byte was read once."""
    index, _ = read_source(str(folder))
    index = index.dequantized_to(dtype) if dtype else index
    found = {}
    with open_source(str(folder)).open(index.files) as source:
        reader = RowReader(index.format, source)
        for name, tensor in index.tensors.items():
            rows = tensor.shape[0] if tensor.shape else 1
            raw = bytearray(tensor.num_bytes)
            width = tensor.num_bytes // rows
            for begin in range(0, rows, step):
                end = min(begin + step, rows)
                reader.read(tensor, begin, end, memoryview(raw)[begin * width : end * width])
            values = torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, ARRAY_NAMES[tensor.dtype]))
            found[name] = values.reshape(tensor.shape)
        assert source.bytes_read == index.num_bytes
    return found


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit are equal."""
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(_bits(one), _bits(two))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
Stored = dict[str, torch.Tensor]
Quantizer = Callable[[torch.Tensor], tuple[Stored, torch.Tensor]]
"""Makes the stored tensors of a weight, by the end of their name, and the dense weight that they mean, in float32."""


def block_fp8(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """DeepSeek's: amax / 448 of every block of 128 x 128, float32."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = weight[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            scale[row, column] = block.float().abs().max() / 448
    each = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    stored = (weight.float() / each).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * each


def int4_groups(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """compressed-tensors' pack-quantized: symmetric INT4 with a bfloat16 scale per 32 input features."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    groups = weight.float().reshape(len(weight), -1, 32)
    scale = (groups.abs().amax(2) / 7.5).bfloat16()
    stored = (groups / scale.float()[:, :, None]).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
    meant = (stored.reshape(groups.shape) * scale.float()[:, :, None]).reshape(weight.shape)
    tensors = {"weight_packed": pack_to_int32(stored, 4), "weight_scale": scale}
    return {**tensors, "weight_shape": torch.tensor(weight.shape)}, meant


def mxfp4_groups(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """compressed-tensors' mxfp4-pack-quantized: E2M1 with a power of two per 32 input features."""
    groups = weight.float().reshape(len(weight), -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(2).clamp(min=1e-30))) - 2
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = groups / torch.exp2(exponent)[:, :, None]
    codes = (scaled.abs()[..., None] - values).abs().argmin(-1).to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    table = torch.cat([values, -values])
    meant = (table[codes.long()] * torch.exp2(exponent)[:, :, None]).reshape(weight.shape)
    codes = codes.reshape(weight.shape)
    return {"weight_packed": codes[:, 0::2] | (codes[:, 1::2] << 4), "weight_scale": (exponent + 127).to(torch.uint8)}, meant


def fp8_tensor(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Model Optimizer's FP8: a scale per weight, different in joined linears, and one of its input."""
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(0.05)}, stored.float() * scale


def fp8_dynamic(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """FP8 with a scale per weight, different in joined linears, and activations scaled at run time."""
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * scale


def mxfp8(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Model Optimizer's MXFP8: E4M3 with a power of two per 32 input features."""
    groups = weight.float().reshape(len(weight), -1, 32)
    exponent = torch.ceil(torch.log2(groups.abs().amax(2) / 448))
    stored = (groups / torch.exp2(exponent)[:, :, None]).to(torch.float8_e4m3fn)
    meant = (stored.float() * torch.exp2(exponent)[:, :, None]).reshape(weight.shape)
    return {"weight": stored.reshape(weight.shape), "weight_scale": (exponent + 127).to(torch.uint8)}, meant


def compressed_nvfp4(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """compressed-tensors' NVFP4, whose second scales divide. They are powers of two here, so that their inverses are exact."""
    found, _ = nvfp4(weight * (6 * 448 / 4096))
    factor, values = torch.tensor([4096.0]), found["weight_scale"].float()
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.stack([found["weight"] & 15, found["weight"] >> 4], -1).reshape(weight.shape)
    signed = torch.cat([table, -table])[codes.long()]
    meant = (signed.reshape(len(weight), -1, 16) * (values / factor)[:, :, None]).reshape(weight.shape)
    tensors = {"weight_packed": found["weight"], "weight_scale": found["weight_scale"], "weight_global_scale": factor}
    return {**tensors, "input_global_scale": torch.tensor([128.0])}, meant


def fp8_rows(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """FBGEMM's FP8: a scale per row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def nvfp4(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Model Optimizer's NVFP4, packed by itself, with one second scale for all linears."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    second = torch.tensor(1.0 / (6 * 448))
    packed, scale, _ = NVFP4QTensor.quantize(weight.float(), 16, weights_scaling_factor_2=second, try_tensorrt=False)
    meant = packed.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
    tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": second}
    return {**tensors, "input_scale": torch.tensor(0.01)}, meant


def write_both(
    plain: Path, folder: Path, quantizer: Quantizer, quantization: Mapping[str, Any], dtype: torch.dtype | None = None
) -> tuple[Path, Path]:
    """Quantize the linears of the layers of a saved model; also write the dense model of the same values.

    `dtype` of the dense model; None: the model's.
    """
    tensors = safetensors.torch.load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    stored: Stored = {}
    meant: Stored = {}
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.dim() != 2 or name.endswith("mlp.gate.weight"):
            stored[name] = meant[name] = tensor
            continue
        parts, values = quantizer(tensor)
        stored |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
        meant[name] = values.to(dtype or tensor.dtype)
    quantized = write_quantized(folder / "quantized", stored, quantization, **config)
    (folder / "dense").mkdir()
    safetensors.torch.save_file(meant, folder / "dense" / "model.safetensors", {"format": "pt"})
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    return quantized, folder / "dense"
