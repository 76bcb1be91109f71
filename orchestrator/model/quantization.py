"""Storage formats of quantized linears: weights, activations and scales, evaluated on shapes alone.

Names, shapes and dtypes are those of TensorRT-LLM's checkpoints as Model Optimizer 0.47 exports them. `quantizers` computes the
scales and packs the weights; `networks` uses them in graphs.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.base.errors import ArchitectureError, QuantizationError

FP8_MAX = 448.0
"""Largest finite E4M3 number."""
FP4_MAX = 6.0
"""Largest E2M1 number."""
NVFP4_BLOCK = 16
MXFP8_BLOCK = 32

LINEARS = (
    "attention.qkv",
    "attention.fused_a",
    "attention.q_b_proj",
    "attention.gate",
    "attention.dense",
    "mlp.fc",
    "mlp.gate",
    "mlp.proj",
    "mlp.shared_expert.fc",
    "mlp.shared_expert.proj",
)
"""Linears of a layer that may be quantized. Embedding, head, router and norms never are, as in TensorRT-LLM's defaults."""
ALWAYS_EXCLUDED = ("lm_head", "*router", "*vocab_embedding", "*shared_expert_gate")


class WeightFormat(StrEnum):
    """Storage format of a weight."""

    INT8_CHANNEL = "int8_channel"
    """INT8 with a scale per output row."""
    INT4_BLOCK = "int4_block"
    """INT4, two rows per byte, with a scale per block of input features."""
    INT4_BLOCK_FP8 = "int4_block_fp8"
    """INT4_BLOCK that is dequantized into FP8, with one more scale per tensor."""
    FP8_TENSOR = "fp8_tensor"
    FP8_CHANNEL = "fp8_channel"
    NVFP4 = "nvfp4"
    """E2M1 pairs along the input features, an E4M3 scale per 16 of them, a float32 scale per tensor."""
    MXFP8 = "mxfp8"
    """E4M3 with a power-of-two scale (E8M0) per 32 input features."""


class ActivationFormat(StrEnum):
    """Number format to which the input of a quantized linear is rounded."""

    NONE = "none"
    INT8_TENSOR = "int8_tensor"
    """INT8 with one calibrated scale."""
    FP8_TENSOR = "fp8_tensor"
    FP8_TOKEN = "fp8_token"  # noqa: S105 - tokens of text
    """FP8 with a scale per token, computed at run time."""
    NVFP4 = "nvfp4"
    """E2M1 with block scales computed at run time and a calibrated scale per tensor."""
    MXFP8 = "mxfp8"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LinearFormat(_Value):
    """Format of a quantized linear, which determines its storage and its graph."""

    algorithm: str
    """QuantAlgo of TensorRT-LLM, e.g. W4A16_AWQ."""
    weight: WeightFormat
    activation: ActivationFormat = ActivationFormat.NONE
    block_size: int = 0
    """Input features per scale; 0: not blockwise. `group_size` in TensorRT-LLM."""
    pre_quant_scale: bool = False
    """Whether the input is first multiplied by a vector whose inverse was multiplied into the weight (AWQ, SmoothQuant)."""
    activation_limit: float | None = None
    """For FP8_TOKEN: bound of the absolute values that determine the scale (Meta's recipe)."""
    fuse_gate: bool = False
    """Whether mlp.fc and mlp.gate share their per-tensor scales, as in Model Optimizer's exports of FP8 and NVFP4."""


@dataclass(frozen=True, slots=True)
class ScaleTensor:
    """A scale tensor of a quantized weight."""

    suffix: str
    """Part of the name after the linear's name."""
    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]
    origin: Literal["weight", "weight_amax", "input_amax", "pre_quant_scale"]
    """Source of the scale. weight: computed while the elements are packed; others: quantities of the calibration artifact."""
    divisor: float = 1.0
    """Divisor that turns an amax into a scale."""


def packed(fmt: LinearFormat, size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """Return the dtype and shape in which a weight of `size` (out, in) is stored."""
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
    """Return the scale tensors of a quantized weight of `size` (out, in). `model_dtype` is safetensors' name."""
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
"""Scales of the KV cache, F32 [1] each, after `attention.`. The last is the larger of the two, for readers of a single scale."""

MIXED_PRECISION = "MIXED_PRECISION"


class ModelQuantization(_Value):
    """Formats of the linears and of the KV cache of a model."""

    algorithm: str | None
    """QuantAlgo; MIXED_PRECISION: `layers` decides; None: only the KV cache is quantized."""
    linear: LinearFormat | None = None
    """Format of every linear that is neither excluded nor named in `layers`."""
    exclude: tuple[str, ...] = ()
    """fnmatch patterns of names such as transformer.layers.7.mlp.proj (global layer numbers)."""
    layers: dict[str, LinearFormat | None] = Field(default_factory=dict)
    """For MIXED_PRECISION: name -> format, named as in `exclude`. A linear that is not listed keeps the model's dtype."""
    kv_cache: KvCacheFormat | None = None
    alpha: float | None = None
    """Migration strength of SmoothQuant, recorded in config.json."""
    meta_recipe: bool = False
    as_stored: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether codes and scales are those of the source: nothing is calibrated."""

    def format_of(self, linear: str) -> LinearFormat | None:
        """Return the format of a linear, e.g. transformer.layers.7.attention.qkv; None: not quantized."""
        if self.algorithm == MIXED_PRECISION:
            return self.layers.get(linear)
        if any(fnmatch.fnmatchcase(linear, pattern) for pattern in self.exclude):
            return None
        return self.linear

    def formats(self) -> tuple[LinearFormat, ...]:
        """Return the distinct formats of the linears."""
        found = [*([self.linear] if self.linear else []), *(item for item in self.layers.values() if item)]
        return tuple(dict.fromkeys(found))


_TENSORRT_ONLY = (WeightFormat.NVFP4, WeightFormat.MXFP8, ActivationFormat.NVFP4, ActivationFormat.MXFP8)


def check_portable(quantization: ModelQuantization | None, *, has_equal_caches: bool = True) -> None:
    """Check that ONNX Runtime GenAI takes the model's caches and has operators for its number formats.

    Raises ArchitectureError for caches of two sizes, QuantizationError for NVFP4 and MXFP8.
    """
    if not has_equal_caches:
        raise ArchitectureError(
            "ONNX Runtime GenAI takes the caches of all layers to be of one size, and this model has heads of two sizes",
            "Leave `portable` out of release.include.",
        )
    for fmt in quantization.formats() if quantization else ():
        if fmt.weight in _TENSORRT_ONLY or fmt.activation in _TENSORRT_ONLY:
            raise QuantizationError(
                f"ONNX Runtime has no operators for weights in {fmt.weight.value} with activations in {fmt.activation.value}",
                "Leave `portable` out of release.include, or choose a quantization in FP8, INT8 or INT4.",
            )


def check_cache(quantization: ModelQuantization | None, *, is_latent: bool) -> None:
    """Check that a model's KV cache can have its number format. Raises QuantizationError with latent attention."""
    if quantization is not None and quantization.kv_cache is not None and is_latent:
        raise QuantizationError(
            f"the cache of latent attention (MLA) holds latents, which are not quantized to {quantization.kv_cache}",
            "Leave quantization.kv_cache out. The latents of a token are already a small part of the keys and values of all heads.",
        )


def linear_of(target: str) -> str | None:
    """Return `transformer.layers.N.attention.qkv` for the same with `.weight`; None: not a weight that may be quantized."""
    linear = target.removesuffix(".weight")
    if linear == target or not linear.startswith("transformer.layers."):
        return None
    return linear if linear.split(".", 3)[3] in LINEARS else None


def global_name(linear: str, local: int, layer: int) -> str:
    """Replace the layer number within the stage, `local`, by the number in the whole model, `layer`."""
    return linear.replace(f"transformer.layers.{local}.", f"transformer.layers.{layer}.", 1)


class CalibrationMethod(_Value):
    """Calibration method, in Model Optimizer's terms."""

    method: Literal["max", "smoothquant", "awq_lite"]
    """Name of the method. `max` collects every amax that any format needs, so formats that only need amax share a calibration."""
    alpha: float | None = None
    """For SmoothQuant: migration strength from activations to weights."""
    alpha_step: float | None = None
    """For AWQ: step of the search over alpha from 0 to 1."""


def quantization_config(quantization: ModelQuantization | None) -> dict[str, Any]:
    """Return the `quantization` block of config.json, with TensorRT-LLM's names and defaults."""
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
    """Return quant_cfg.json, a file beside config.json; None: not MIXED_PRECISION."""
    if quantization.algorithm != MIXED_PRECISION:
        return None
    layers = {name: _layer_entry(fmt) for name, fmt in quantization.layers.items() if fmt is not None}
    return {"quant_algo": MIXED_PRECISION, "kv_cache_quant_algo": quantization.kv_cache, "quantized_layers": layers}


def _layer_entry(fmt: LinearFormat) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": fmt.algorithm}
    if fmt.block_size:
        entry["group_size"] = fmt.block_size
    if fmt.weight is WeightFormat.FP8_CHANNEL and fmt.activation is ActivationFormat.FP8_TENSOR:
        entry["weight_format"] = fmt.weight.value  # joined weights of a source, which TensorRT-LLM's FP8 does not have
    if fmt.pre_quant_scale:
        entry |= {"has_zero_point": False, "pre_quant_scale": True}
    return entry
