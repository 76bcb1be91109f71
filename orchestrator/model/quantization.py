"""How a quantized linear is stored: formats of weights and activations as values, evaluated on shapes alone.

Names, shapes and dtypes are those of TensorRT-LLM's checkpoints as Model Optimizer 0.47 exports them. What the numbers are
(scales, packing) is the business of `quantizers`; how a graph uses them, of `networks`.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FP8_MAX = 448.0
"""Largest finite E4M3 number."""
FP4_MAX = 6.0
"""Largest E2M1 number."""
NVFP4_BLOCK = 16
MXFP8_BLOCK = 32

LINEARS = (
    "attention.qkv",
    "attention.dense",
    "mlp.fc",
    "mlp.gate",
    "mlp.proj",
    "mlp.shared_expert.fc",
    "mlp.shared_expert.proj",
)
"""What may be quantized of a layer. Embedding, head, router and norms never are, as in TensorRT-LLM's default exclusions."""
ALWAYS_EXCLUDED = ("lm_head", "*router", "*vocab_embedding", "*shared_expert_gate")


class WeightFormat(StrEnum):
    """How the elements of a weight are stored."""

    INT8_CHANNEL = "int8_channel"
    """One scale per output row."""
    INT4_BLOCK = "int4_block"
    """One scale per block along the input features; two rows per byte."""
    INT4_BLOCK_FP8 = "int4_block_fp8"
    """The same, and dequantized into FP8 with one more scale per tensor."""
    FP8_TENSOR = "fp8_tensor"
    FP8_CHANNEL = "fp8_channel"
    NVFP4 = "nvfp4"
    """E2M1 pairs along the input features, an E4M3 scale per 16 of them, a float32 scale per tensor."""
    MXFP8 = "mxfp8"
    """E4M3 with a power-of-two scale (E8M0) per 32 input features."""


class ActivationFormat(StrEnum):
    """How the input of a quantized linear is rounded before the product."""

    NONE = "none"
    INT8_TENSOR = "int8_tensor"
    """Static, one calibrated scale."""
    FP8_TENSOR = "fp8_tensor"
    FP8_TOKEN = "fp8_token"  # noqa: S105 - tokens of text
    """A scale per token, computed at run time."""
    NVFP4 = "nvfp4"
    """Block scales at run time under a calibrated scale per tensor."""
    MXFP8 = "mxfp8"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinearFormat(_Value):
    """Everything that the storage and the graph of a quantized linear follow from."""

    algorithm: str
    """QuantAlgo of TensorRT-LLM, e.g. W4A16_AWQ."""
    weight: WeightFormat
    activation: ActivationFormat = ActivationFormat.NONE
    block_size: int = 0
    """Input features that share a scale; 0: not blockwise. `group_size` in TensorRT-LLM."""
    pre_quant_scale: bool = False
    """The input is first multiplied by a vector, by whose inverse the weight was multiplied (AWQ, SmoothQuant)."""
    activation_limit: float | None = None
    """FP8_TOKEN only: absolute values above it do not raise the scale (Meta's recipe)."""
    fuse_gate: bool = False
    """mlp.fc and mlp.gate share their per-tensor scales, as Model Optimizer's exporter does for FP8 and NVFP4."""


@dataclass(frozen=True, slots=True)
class ScaleTensor:
    """A tensor that stands beside a quantized weight."""

    suffix: str
    """Of its name, after the linear's."""
    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]
    origin: Literal["weight", "weight_amax", "input_amax", "pre_quant_scale"]
    """weight: computed from the elements while they are packed; the others: a quantity of the calibration artifact."""
    divisor: float = 1.0
    """An amax becomes a scale by this."""


def packed(fmt: LinearFormat, size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """(dtype, shape) in which a weight of `size` (out, in) is stored."""
    out, inner = size
    match fmt.weight:
        case WeightFormat.INT8_CHANNEL:
            return "I8", (out, inner)
        case WeightFormat.INT4_BLOCK | WeightFormat.INT4_BLOCK_FP8:
            return "I8", (out // 2, inner)
        case WeightFormat.NVFP4:
            return "U8", (out, inner // 2)
        case _:
            return "F8_E4M3", (out, inner)


def scale_tensors(fmt: LinearFormat, size: tuple[int, int], model_dtype: str) -> tuple[ScaleTensor, ...]:
    """What stands beside a quantized weight of `size` (out, in); `model_dtype` is safetensors' name."""
    found = [*_weight_scales(fmt, size), *_activation_scales(fmt)]
    if fmt.pre_quant_scale:
        found.append(ScaleTensor("prequant_scaling_factor", model_dtype, (size[1],), "pre_quant_scale"))
    return tuple(found)


def _weight_scales(fmt: LinearFormat, size: tuple[int, int]) -> tuple[ScaleTensor, ...]:
    out, inner = size
    name, second = "weights_scaling_factor", "weights_scaling_factor_2"
    match fmt.weight:
        case WeightFormat.INT8_CHANNEL:
            return (ScaleTensor(name, "F32", (out,), "weight"),)
        case WeightFormat.FP8_CHANNEL:
            return (ScaleTensor("per_channel_scale", "F32", (out,), "weight"),)
        case WeightFormat.FP8_TENSOR:
            return (ScaleTensor(name, "F32", (1,), "weight_amax", FP8_MAX),)
        case WeightFormat.INT4_BLOCK:
            return (ScaleTensor(name, "F32", (out, inner // fmt.block_size), "weight"),)
        case WeightFormat.INT4_BLOCK_FP8:
            blocks = ScaleTensor(name, "F32", (out, inner // fmt.block_size), "weight")
            return blocks, ScaleTensor(second, "F32", (1,), "weight_amax", FP8_MAX)
        case WeightFormat.NVFP4:
            blocks = ScaleTensor(name, "F8_E4M3", (out, inner // NVFP4_BLOCK), "weight")
            return blocks, ScaleTensor(second, "F32", (), "weight_amax", FP4_MAX * FP8_MAX)
        case WeightFormat.MXFP8:
            return (ScaleTensor(name, "U8", (out, inner // MXFP8_BLOCK), "weight"),)


def _activation_scales(fmt: LinearFormat) -> tuple[ScaleTensor, ...]:
    name = "activation_scaling_factor"
    match fmt.activation:
        case ActivationFormat.INT8_TENSOR:
            return (ScaleTensor(name, "F32", (1,), "input_amax", 127.0),)
        case ActivationFormat.FP8_TENSOR:
            return (ScaleTensor(name, "F32", (1,), "input_amax", FP8_MAX),)
        case ActivationFormat.NVFP4:
            return (ScaleTensor(name, "F32", (), "input_amax", FP4_MAX * FP8_MAX),)
        case _:
            return ()


KvCacheFormat = Literal["INT8", "FP8"]
KV_CACHE_MAX: dict[KvCacheFormat, float] = {"INT8": 127.0, "FP8": FP8_MAX}
KV_CACHE_SCALES = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")
"""F32 [1] each, after `attention.`; the last is the larger of the two, for readers that know one scale only."""

MIXED_PRECISION = "MIXED_PRECISION"


class ModelQuantization(_Value):
    """Which linears of a model are stored in which format."""

    algorithm: str | None
    """QuantAlgo; MIXED_PRECISION when `layers` decides; None: only the KV cache is quantized."""
    linear: LinearFormat | None = None
    """Of every linear that is neither excluded nor named in `layers`."""
    exclude: tuple[str, ...] = ()
    """Patterns as in fnmatch of names such as transformer.layers.7.mlp.proj (global layer numbers)."""
    layers: dict[str, LinearFormat | None] = Field(default_factory=dict)
    """MIXED_PRECISION: by name, as in `exclude`; a linear that is not listed keeps the model's precision."""
    kv_cache: KvCacheFormat | None = None
    alpha: float | None = None
    """SmoothQuant's, recorded in config.json."""
    meta_recipe: bool = False

    def format_of(self, linear: str) -> LinearFormat | None:
        """The format of a linear, e.g. transformer.layers.7.attention.qkv; None: the model's precision."""
        if self.algorithm == MIXED_PRECISION:
            return self.layers.get(linear)
        if any(fnmatch.fnmatchcase(linear, pattern) for pattern in self.exclude):
            return None
        return self.linear

    def formats(self) -> tuple[LinearFormat, ...]:
        """Every format that occurs, without repetition."""
        found = [*([self.linear] if self.linear else []), *(item for item in self.layers.values() if item)]
        return tuple(dict.fromkeys(found))


def linear_of(target: str) -> str | None:
    """`...attention.qkv` of `transformer.layers.N.attention.qkv.weight`; None when the tensor is no quantizable weight."""
    linear = target.removesuffix(".weight")
    if linear == target or not linear.startswith("transformer.layers."):
        return None
    return linear if linear.split(".", 3)[3] in LINEARS else None


def global_name(linear: str, local: int, layer: int) -> str:
    """A linear's name within its stage, with the layer's number in the whole model."""
    return linear.replace(f"transformer.layers.{local}.", f"transformer.layers.{layer}.", 1)


class CalibrationMethod(_Value):
    """What Model Optimizer is asked for, in its own terms."""

    method: Literal["max", "smoothquant", "awq_lite"]
    """max collects every amax that any format needs, so formats that only need those share one calibration."""
    alpha: float | None = None
    """SmoothQuant: how much of the difficulty moves from activations to weights."""
    alpha_step: float | None = None
    """AWQ: step of the search over alpha from 0 to 1."""


def quantization_config(quantization: ModelQuantization | None) -> dict[str, Any]:
    """The `quantization` block of config.json, with TensorRT-LLM's names and defaults."""
    block: dict[str, Any] = {
        "quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "smoothquant_val": 0.5, "clamp_val": None,
        "use_meta_recipe": False, "has_zero_point": False, "pre_quant_scale": False, "exclude_modules": None,
    }  # fmt: skip
    if quantization is None:
        return block
    block["quant_algo"], block["kv_cache_quant_algo"] = quantization.algorithm, quantization.kv_cache
    block["use_meta_recipe"] = quantization.meta_recipe
    if quantization.alpha is not None:
        block["smoothquant_val"] = quantization.alpha
    if quantization.linear is not None:
        linear = quantization.linear
        block["group_size"] = linear.block_size or 128
        block["pre_quant_scale"] = linear.pre_quant_scale
        block["exclude_modules"] = [*ALWAYS_EXCLUDED, *quantization.exclude]
        if linear.activation_limit is not None:
            block["clamp_val"] = [-linear.activation_limit, linear.activation_limit]
    return block


def quant_cfg(quantization: ModelQuantization) -> dict[str, Any] | None:
    """quant_cfg.json, which stands beside config.json for MIXED_PRECISION only."""
    if quantization.algorithm != MIXED_PRECISION:
        return None
    layers = {name: _layer_entry(fmt) for name, fmt in quantization.layers.items() if fmt is not None}
    return {"quant_algo": MIXED_PRECISION, "kv_cache_quant_algo": quantization.kv_cache, "quantized_layers": layers}


def _layer_entry(fmt: LinearFormat) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": fmt.algorithm}
    if fmt.block_size:
        entry["group_size"] = fmt.block_size
    if fmt.pre_quant_scale:
        entry |= {"has_zero_point": False, "pre_quant_scale": True}
    return entry
