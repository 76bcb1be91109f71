"""INT4 weights rounded to nearest, a scale per block of input features. Data-free, and the least exact of all."""

from __future__ import annotations

from orchestrator.core.quantization import LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

W4A16 = Quantizer(
    linear=LinearFormat(algorithm="W4A16", weight=WeightFormat.INT4_BLOCK, block_size=128),
    calibration=None,
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=1.2, min_top1_agreement=0.45),
)
