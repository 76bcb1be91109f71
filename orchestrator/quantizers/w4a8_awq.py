"""AWQ with FP8 activations: INT4 weights per block, dequantized into E4M3."""

from __future__ import annotations

from orchestrator.core.quantization import ActivationFormat, CalibrationMethod, LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

W4A8_AWQ = Quantizer(
    linear=LinearFormat(
        algorithm="W4A8_AWQ",
        weight=WeightFormat.INT4_BLOCK_FP8,
        activation=ActivationFormat.FP8_TENSOR,
        block_size=128,
        pre_quant_scale=True,
    ),
    calibration=CalibrationMethod(method="awq_lite", alpha_step=0.1),
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.6, min_top1_agreement=0.58),
)
