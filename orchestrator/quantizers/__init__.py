"""The quantizers: a table with one fully specified algorithm per row.

A user picks a name of TensorRT-LLM (QuantAlgo). The row holds the storage format of a linear, its calibration, and the tolerance
of the verification.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.model.quantization import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    ActivationFormat,
    CalibrationMethod,
    LinearFormat,
    WeightFormat,
)
from orchestrator.spec.build import ToleranceSpec


@dataclass(frozen=True, slots=True)
class Quantizer:
    """An algorithm, fully specified."""

    linear: LinearFormat
    calibration: CalibrationMethod | None
    """Calibration method; None: data-free."""
    tolerance: ToleranceSpec
    """Tolerance of verification against the unquantized model: about twice the error of a 135M-parameter model, which is far
    more sensitive than larger models."""
    exclude: tuple[str, ...] = ()
    """Patterns of linears that keep the model's dtype by default."""


_TABLE = (
    # INT8 weights, one scale per output row; activations keep the model's dtype. Data-free.
    Quantizer(
        linear=LinearFormat(algorithm="W8A16", weight=WeightFormat.INT8_CHANNEL),
        calibration=None,
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.01, min_top1_agreement=0.95),
    ),
    # INT4 weights rounded to nearest, a scale per block of input features. Data-free, the least exact of all.
    Quantizer(
        linear=LinearFormat(algorithm="W4A16", weight=WeightFormat.INT4_BLOCK, block_size=128),
        calibration=None,
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=1.2, min_top1_agreement=0.45),
    ),
    # E4M3 weights with a scale per output row, activations with one per token, computed at run time. Data-free.
    Quantizer(
        linear=LinearFormat(
            algorithm="FP8_PER_CHANNEL_PER_TOKEN", weight=WeightFormat.FP8_CHANNEL, activation=ActivationFormat.FP8_TOKEN
        ),
        calibration=None,
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.06, min_top1_agreement=0.86),
    ),
    # OCP microscaling: E4M3 with a power-of-two scale per 32 input features, of weights and activations. Data-free.
    Quantizer(
        linear=LinearFormat(
            algorithm="MXFP8", weight=WeightFormat.MXFP8, activation=ActivationFormat.MXFP8, block_size=MXFP8_BLOCK
        ),
        calibration=None,
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.06, min_top1_agreement=0.86),
    ),
    # E4M3 weights and activations, one static scale each per linear.
    Quantizer(
        linear=LinearFormat(
            algorithm="FP8", weight=WeightFormat.FP8_TENSOR, activation=ActivationFormat.FP8_TENSOR, fuse_gate=True
        ),
        calibration=CalibrationMethod(method="max"),
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.06, min_top1_agreement=0.86),
    ),
    # SmoothQuant: INT8 weights per row and INT8 activations per tensor, outliers moved into the weights first.
    #
    # alpha 0.5 without the MLP's down projection, whose inputs have outliers beyond one INT8 scale. With Model Optimizer's default,
    # alpha 1.0 and all linears, a 135M-parameter Llama lost a third of its top-1 agreement.
    Quantizer(
        linear=LinearFormat(
            algorithm="W8A8_SQ_PER_CHANNEL",
            weight=WeightFormat.INT8_CHANNEL,
            activation=ActivationFormat.INT8_TENSOR,
            pre_quant_scale=True,
        ),
        calibration=CalibrationMethod(method="smoothquant", alpha=0.5),
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.04, min_top1_agreement=0.88),
        exclude=("*.mlp.proj",),
    ),
    # AWQ: INT4 weights per block, input channels scaled by a search that keeps the outputs close.
    Quantizer(
        linear=LinearFormat(algorithm="W4A16_AWQ", weight=WeightFormat.INT4_BLOCK, block_size=128, pre_quant_scale=True),
        calibration=CalibrationMethod(method="awq_lite", alpha_step=0.1),
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.45, min_top1_agreement=0.62),
    ),
    # AWQ with FP8 activations: INT4 weights per block, dequantized into E4M3.
    Quantizer(
        linear=LinearFormat(
            algorithm="W4A8_AWQ",
            weight=WeightFormat.INT4_BLOCK_FP8,
            activation=ActivationFormat.FP8_TENSOR,
            block_size=128,
            pre_quant_scale=True,
        ),
        calibration=CalibrationMethod(method="awq_lite", alpha_step=0.1),
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.6, min_top1_agreement=0.58),
    ),
    # E2M1 weights and activations in blocks of 16 with E4M3 scales (Blackwell).
    Quantizer(
        linear=LinearFormat(
            algorithm="NVFP4",
            weight=WeightFormat.NVFP4,
            activation=ActivationFormat.NVFP4,
            block_size=NVFP4_BLOCK,
            fuse_gate=True,
        ),
        calibration=CalibrationMethod(method="max"),
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.6, min_top1_agreement=0.58),
    ),
    # E2M1 weights in blocks of 16 with E4M3 scales; activations keep the model's dtype.
    Quantizer(
        linear=LinearFormat(algorithm="W4A16_NVFP4", weight=WeightFormat.NVFP4, block_size=NVFP4_BLOCK),
        calibration=CalibrationMethod(method="max"),
        tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.35, min_top1_agreement=0.66),
    ),
)

QUANTIZERS: dict[str, Quantizer] = {quantizer.linear.algorithm: quantizer for quantizer in _TABLE}
"""Name of the algorithm -> quantizer, data-free ones first."""
