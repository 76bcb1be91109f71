"""Quantized linears: the operators around a MatMul for each format of weights and activations.

Operators are ONNX's QuantizeLinear and DequantizeLinear where TensorRT and ONNX Runtime both support them. Activations of NVFP4
and MXFP8 use TensorRT's own operators; the portable graph computes the same numbers with standard operators. TensorRT-RTX 1.7
accepts, in a strongly typed float16 or bfloat16 graph (by experiment): float32 scales with `output_dtype` for INT8 and FP8, scales
of the model's dtype for INT4, float32 dequantization and a Cast for FP4.
"""

from __future__ import annotations

import math
from typing import Any

import onnx

from orchestrator.model.quantization import FP4_MAX, FP8_MAX, MXFP8_BLOCK, NVFP4_BLOCK, ActivationFormat, LinearFormat, WeightFormat
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.shape import RankShape

_TRT = "trt"
"""Domain of TensorRT's own operators."""
_FP8 = onnx.TensorProto.FLOAT8E4M3FN
_E4M3_TINY = 2.0**-9
_AMAX_TINY = 1e-12
"""Smallest amax of a token, so that the scale of a token of zeros is not zero."""


def quantized_matmul(graph: GraphWriter, shape: RankShape, x: str, prefix: str, size: tuple[int, int], fmt: LinearFormat) -> str:
    """Add x @ weight^T of a quantized linear. `size`: (out, in)."""
    weight = quantized_weight(graph, shape, prefix, size, fmt)
    transposed = graph.node("Transpose", [weight], f"{prefix}.weight_t", perm=[1, 0])
    rounded, factor = quantized_input(graph, shape, x, prefix, size[1], fmt)
    product = graph.node("MatMul", [rounded, transposed], f"{prefix}.matmul")
    return product if factor is None else graph.node("Mul", [product, factor], f"{prefix}.rescaled")


def quantized_weight(
    graph: GraphWriter, shape: RankShape, prefix: str, size: tuple[int, int], fmt: LinearFormat, experts: int = 0
) -> str:
    """Add the dequantized weight, [out, in] or [experts, out, in], in the graph's dtype."""
    name = f"{prefix}.weight"
    if shape.portable and fmt.weight in (WeightFormat.NVFP4, WeightFormat.MXFP8):
        return graph.unpacked(name, [experts, *size] if experts else size, fmt)
    if not experts:
        return _dequantized(graph, shape, prefix, size, fmt, 1)
    flat = _dequantized(graph, shape, prefix, (experts * size[0], size[1]), fmt, experts)
    return graph.node("Reshape", [flat, graph.constant(f"{name}_shape", [experts, *size])], f"{name}_experts")


def _dequantized(graph: GraphWriter, shape: RankShape, prefix: str, size: tuple[int, int], fmt: LinearFormat, parts: int) -> str:
    """Add the dequantized rows of one weight, or of the weights of all experts in a row (`parts`)."""
    name, scale = f"{prefix}.weight", f"{prefix}.weights_scaling_factor"
    out, to = f"{name}_dq", {"output_dtype": graph.onnx_dtype(shape.dtype)}
    rows, inner = size
    match fmt.weight:
        case WeightFormat.INT8_CHANNEL:
            weight = graph.external(name, "int8", size)
            return graph.node("DequantizeLinear", [weight, graph.external(scale, "float32", [rows])], out, axis=0, **to)
        case WeightFormat.FP8_CHANNEL:
            scale = f"{prefix}.per_channel_scale"
            weight = graph.external(name, "float8", size)
            return graph.node("DequantizeLinear", [weight, graph.external(scale, "float32", [rows])], out, axis=0, **to)
        case WeightFormat.FP8_TENSOR:
            return _per_tensor(graph, graph.external(name, "float8", size), scale, out, parts, to)
        case WeightFormat.INT4_BLOCK:
            return _int4(graph, shape, prefix, size, fmt, out)
        case WeightFormat.INT4_BLOCK_FP8:
            wide = _int4(graph, shape, prefix, size, fmt, f"{name}_int4")
            second = f"{scale}_2"
            if parts > 1:  # one scale per expert, spread over its rows
                rows_scale = _row_scales(graph, second, parts, rows)
                narrow = graph.node("QuantizeLinear", [wide, rows_scale], f"{name}_fp8", output_dtype=_FP8, axis=0)
                return graph.node("DequantizeLinear", [narrow, rows_scale], out, axis=0, **to)
            scalar = graph.external(second, "float32", [])
            narrow = graph.node("QuantizeLinear", [wide, scalar], f"{name}_fp8", output_dtype=_FP8)
            return graph.node("DequantizeLinear", [narrow, scalar], out, **to)
        case WeightFormat.NVFP4:
            return _nvfp4(graph, shape, prefix, size, parts, out)
        case WeightFormat.MXFP8:
            operands = [graph.external(name, "float8", size), graph.external(scale, "uint8", [rows, inner // MXFP8_BLOCK])]
            return _mxfp8_dequantized(graph, operands, out, shape.dtype)


def _per_tensor(graph: GraphWriter, weight: str, scale: str, out: str, parts: int, to: dict[str, Any]) -> str:
    """Add dequantization with one scale, or with one scale per expert."""
    if parts == 1:
        return graph.node("DequantizeLinear", [weight, graph.external(scale, "float32", [])], out, **to)
    rows = graph.shape_of(weight)[0]
    return graph.node("DequantizeLinear", [weight, _row_scales(graph, scale, parts, rows)], out, axis=0, **to)


def _row_scales(graph: GraphWriter, scale: str, parts: int, rows: int) -> str:
    """Add the scales of the parts, [parts], repeated for their rows to [rows]."""
    column = graph.external(scale, "float32", [parts, 1])
    spread = graph.node("Expand", [column, graph.constant(f"shape_{parts}_{rows}", [parts, rows // parts])], f"{scale}.spread")
    return graph.node("Reshape", [spread, graph.constant(f"rows_{rows}", [rows])], f"{scale}.rows")


def _int4(graph: GraphWriter, shape: RankShape, prefix: str, size: tuple[int, int], fmt: LinearFormat, out: str) -> str:
    weight = graph.external(f"{prefix}.weight", "int4", size)
    scale = graph.external(f"{prefix}.weights_scaling_factor", shape.dtype, [size[0], size[1] // fmt.block_size])
    return graph.node("DequantizeLinear", [weight, scale], out, axis=1, block_size=fmt.block_size)


def _nvfp4(graph: GraphWriter, shape: RankShape, prefix: str, size: tuple[int, int], parts: int, out: str) -> str:
    """Add dequantization in two levels: the E4M3 block scales by the float32 scale, then the E2M1 elements by the block scales."""
    scale = f"{prefix}.weights_scaling_factor"
    blocks = graph.external(scale, "float8", [size[0], size[1] // NVFP4_BLOCK])
    if parts == 1:
        wide = graph.node("DequantizeLinear", [blocks, graph.external(f"{scale}_2", "float32", [])], f"{scale}_dq")
    else:
        rows = _row_scales(graph, f"{scale}_2", parts, size[0])
        wide = graph.node("DequantizeLinear", [blocks, rows], f"{scale}_dq", axis=0)
    weight = graph.external(f"{prefix}.weight", "float4", size)
    elements = graph.node("DequantizeLinear", [weight, wide], f"{out}_wide", axis=1, block_size=NVFP4_BLOCK)
    return graph.node("Cast", [elements], out, to=graph.onnx_dtype(shape.dtype))


def _mxfp8_dequantized(graph: GraphWriter, operands: list[str], out: str, dtype: str) -> str:
    return graph.node(
        "TRT_MXFP8DequantizeLinear", operands, out,
        domain=_TRT, axis=-1, block_size=MXFP8_BLOCK, output_dtype=graph.onnx_dtype(dtype),
    )  # fmt: skip


def quantized_input(
    graph: GraphWriter, shape: RankShape, x: str, prefix: str, inner: int, fmt: LinearFormat
) -> tuple[str, str | None]:
    """Add the rounding of a linear's input. Returns the rounded input, and the factor per token of the product (None: none)."""
    if fmt.pre_quant_scale:
        vector = graph.external(f"{prefix}.prequant_scaling_factor", shape.dtype, [inner])
        x = graph.node("Mul", [x, vector], f"{prefix}.smoothed")
    match fmt.activation:
        case ActivationFormat.NONE:
            return x, None
        case ActivationFormat.INT8_TENSOR:
            return _static(graph, shape, x, prefix, onnx.TensorProto.INT8), None
        case ActivationFormat.FP8_TENSOR:
            return _static(graph, shape, x, prefix, _FP8), None
        case ActivationFormat.FP8_TOKEN:
            return _per_token(graph, shape, x, prefix, fmt)
        case ActivationFormat.NVFP4 if shape.portable:
            return _nvfp4_portable(graph, x, prefix, inner), None
        case ActivationFormat.NVFP4:
            return _nvfp4_tensorrt(graph, shape, x, prefix), None
        case ActivationFormat.MXFP8 if shape.portable:
            return _mxfp8_portable(graph, x, prefix, inner), None
        case ActivationFormat.MXFP8:
            return _mxfp8_tensorrt(graph, shape, x, prefix), None


def _static(graph: GraphWriter, shape: RankShape, x: str, prefix: str, to: int) -> str:
    scale = graph.external(f"{prefix}.activation_scaling_factor", "float32", [])
    narrow = graph.node("QuantizeLinear", [x, scale], f"{prefix}.input_q", output_dtype=to)
    return graph.node("DequantizeLinear", [narrow, scale], f"{prefix}.input_dq", output_dtype=graph.onnx_dtype(shape.dtype))


def _per_token(graph: GraphWriter, shape: RankShape, x: str, prefix: str, fmt: LinearFormat) -> tuple[str, str]:
    """Divide each token by its scale and round with a constant scale of one. The caller multiplies the product by the scale.

    TensorRT's QuantizeLinear requires constant scales; the arithmetic is the same.
    """
    wide = graph.node("Cast", [x], f"{prefix}.input_wide", to=onnx.TensorProto.FLOAT)
    size = graph.node("Abs", [wide], f"{prefix}.input_abs")
    amax = graph.node("ReduceMax", [size, graph.constant("axis_last", [-1])], f"{prefix}.input_amax", keepdims=1)
    amax = graph.node("Max", [amax, graph.scalar("amax_tiny", _AMAX_TINY, "float32")], f"{prefix}.input_positive")
    if fmt.activation_limit is not None:
        limit = graph.scalar(f"limit_{fmt.activation_limit}", fmt.activation_limit, "float32")
        amax = graph.node("Min", [amax, limit], f"{prefix}.input_limited")
    scale = graph.node("Div", [amax, graph.scalar("fp8_max", FP8_MAX, "float32")], f"{prefix}.input_scale")
    scaled = graph.node("Div", [wide, scale], f"{prefix}.input_scaled")
    rounded = _through_fp8(graph, scaled, f"{prefix}.input", shape.dtype)
    return rounded, graph.node("Cast", [scale], f"{prefix}.input_factor", to=graph.onnx_dtype(shape.dtype))


def _through_fp8(graph: GraphWriter, x: str, output: str, dtype: str) -> str:
    """Round to E4M3 and back, with a scale of one."""
    one = graph.scalar("scale_one", 1.0, "float32")
    narrow = graph.node("QuantizeLinear", [x, one], f"{output}_q", output_dtype=_FP8)
    return graph.node("DequantizeLinear", [narrow, one], f"{output}_dq", output_dtype=graph.onnx_dtype(dtype))


def _nvfp4_tensorrt(graph: GraphWriter, shape: RankShape, x: str, prefix: str) -> str:
    scale = graph.external(f"{prefix}.activation_scaling_factor", "float32", [])
    narrow, blocks = f"{prefix}.input_fp4", f"{prefix}.input_blocks"
    graph.nodes(
        "TRT_FP4DynamicQuantize", [x, scale], [narrow, blocks],
        domain=_TRT, axis=-1, block_size=NVFP4_BLOCK, scale_type=_FP8,
    )  # fmt: skip
    scales = graph.node("DequantizeLinear", [blocks, scale], f"{prefix}.input_scales")
    wide = graph.node("DequantizeLinear", [narrow, scales], f"{prefix}.input_wide", axis=-1, block_size=NVFP4_BLOCK)
    return graph.node("Cast", [wide], f"{prefix}.input_dq", to=graph.onnx_dtype(shape.dtype))


def _nvfp4_portable(graph: GraphWriter, x: str, prefix: str, inner: int) -> str:
    """Round as _nvfp4_tensorrt, in float32: block amax / 6 / scale to E4M3, elements to E2M1, ties to even."""
    scale = graph.external(f"{prefix}.activation_scaling_factor", "float32", [])
    blocks, amax = _blocks(graph, x, prefix, inner, NVFP4_BLOCK)
    bound = graph.node("Mul", [scale, graph.scalar("fp4_max", FP4_MAX, "float32")], f"{prefix}.input_bound")
    raw = graph.node("Div", [amax, bound], f"{prefix}.input_raw_scale")
    limits = [graph.scalar("e4m3_tiny", _E4M3_TINY, "float32"), graph.scalar("fp8_max", FP8_MAX, "float32")]
    clipped = graph.node("Clip", [raw, *limits], f"{prefix}.input_clipped")
    stored = _through_fp8(graph, clipped, f"{prefix}.input_scale", "float32")
    factor = graph.node("Mul", [stored, scale], f"{prefix}.input_factor")
    rounded = _to_e2m1(graph, graph.node("Div", [blocks, factor], f"{prefix}.input_scaled"), f"{prefix}.input")
    return _unblocked(graph, graph.node("Mul", [rounded, factor], f"{prefix}.input_rescaled"), prefix, inner)


def _to_e2m1(graph: GraphWriter, x: str, output: str) -> str:
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign of x: steps of 0.5 below 2, 1 below 4, 2 above."""
    size = graph.node("Abs", [x], f"{output}_size")
    small = graph.node("Min", [size, graph.scalar("fp4_max", FP4_MAX, "float32")], f"{output}_bounded")
    steps = {step: _to_multiple(graph, small, step, f"{output}_step{step}") for step in (0.5, 1.0, 2.0)}
    below_four = graph.node("Less", [small, graph.scalar("four", 4.0, "float32")], f"{output}_below_4")
    below_two = graph.node("Less", [small, graph.scalar("two", 2.0, "float32")], f"{output}_below_2")
    upper = graph.node("Where", [below_four, steps[1.0], steps[2.0]], f"{output}_upper")
    chosen = graph.node("Where", [below_two, steps[0.5], upper], f"{output}_e2m1")
    return graph.node("Mul", [chosen, graph.node("Sign", [x], f"{output}_sign")], f"{output}_signed")


def _to_multiple(graph: GraphWriter, x: str, step: float, output: str) -> str:
    """Round x to a multiple of `step`, ties to the even multiple."""
    size = graph.scalar(f"step_{step}", step, "float32")
    return graph.node("Mul", [graph.node("Round", [graph.node("Div", [x, size], f"{output}_in")], f"{output}_out"), size], output)


def _mxfp8_tensorrt(graph: GraphWriter, shape: RankShape, x: str, prefix: str) -> str:
    narrow, scales = f"{prefix}.input_fp8", f"{prefix}.input_scales"
    graph.nodes(
        "TRT_MXFP8DynamicQuantize", [x], [narrow, scales],
        domain=_TRT, axis=-1, block_size=MXFP8_BLOCK, output_dtype=_FP8,
    )  # fmt: skip
    return _mxfp8_dequantized(graph, [narrow, scales], f"{prefix}.input_dq", shape.dtype)


def _mxfp8_portable(graph: GraphWriter, x: str, prefix: str, inner: int) -> str:
    """Round as _mxfp8_tensorrt, in float32: scale 2 ^ ceil(log2(block amax / 448)), elements to E4M3."""
    blocks, amax = _blocks(graph, x, prefix, inner, MXFP8_BLOCK)
    limit = graph.scalar("fp8_max", FP8_MAX, "float32")
    least = graph.scalar("e8m0_least", 2.0**-127 * FP8_MAX, "float32")
    ratio = graph.node("Div", [graph.node("Max", [amax, least], f"{prefix}.input_positive"), limit], f"{prefix}.input_ratio")
    factor = _power_of_two(graph, ratio, f"{prefix}.input_factor")
    scaled = graph.node("Div", [blocks, factor], f"{prefix}.input_scaled")
    bounds = [graph.scalar("fp8_min", -FP8_MAX, "float32"), limit]
    rounded = _through_fp8(graph, graph.node("Clip", [scaled, *bounds], f"{prefix}.input_clipped"), f"{prefix}.input", "float32")
    return _unblocked(graph, graph.node("Mul", [rounded, factor], f"{prefix}.input_rescaled"), prefix, inner)


def _power_of_two(graph: GraphWriter, x: str, output: str) -> str:
    """Add the least power of two that is not below x.

    The logarithm of an exact power may have a rounding error: take a slightly smaller one, then compare x with the power.
    """
    log = graph.node("Log", [x], f"{output}_log")
    log2 = graph.node("Div", [log, graph.scalar("log_2", math.log(2), "float32")], f"{output}_log2")
    slack = graph.node("Sub", [log2, graph.scalar("log_slack", 1e-4, "float32")], f"{output}_slack")
    two = graph.scalar("two", 2.0, "float32")
    power = graph.node("Pow", [two, graph.node("Ceil", [slack], f"{output}_exponent")], f"{output}_power")
    above = graph.node("Greater", [x, power], f"{output}_above")
    return graph.node("Where", [above, graph.node("Mul", [power, two], f"{output}_twice"), power], output)


def _blocks(graph: GraphWriter, x: str, prefix: str, inner: int, size: int) -> tuple[str, str]:
    """Reshape x to [batch, tokens, blocks, size]. Returns it with the largest absolute value of each block."""
    shape = graph.constant(f"blocks_{inner}_{size}", [0, 0, inner // size, size])
    blocks = graph.node("Reshape", [x, shape], f"{prefix}.input_blocks")
    absolute = graph.node("Abs", [blocks], f"{prefix}.input_abs")
    return blocks, graph.node("ReduceMax", [absolute, graph.constant("axis_last", [-1])], f"{prefix}.input_amax", keepdims=1)


def _unblocked(graph: GraphWriter, x: str, prefix: str, inner: int) -> str:
    return graph.node("Reshape", [x, graph.constant(f"flat_{inner}", [0, 0, inner])], f"{prefix}.input_rounded")
