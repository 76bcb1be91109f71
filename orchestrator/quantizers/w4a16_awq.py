"""AWQ: INT4 weights per block, input channels scaled by a search that keeps the outputs close."""

from __future__ import annotations

from orchestrator.core.quantization import CalibrationMethod, LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

W4A16_AWQ = Quantizer(
    linear=LinearFormat(algorithm="W4A16_AWQ", weight=WeightFormat.INT4_BLOCK, block_size=128, pre_quant_scale=True),
    calibration=CalibrationMethod(method="awq_lite", alpha_step=0.1),
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.45, min_top1_agreement=0.62),
)
