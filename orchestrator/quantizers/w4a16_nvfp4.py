"""E2M1 weights in blocks of 16 with E4M3 scales; activations keep the model's precision."""

from __future__ import annotations

from orchestrator.core.quantization import NVFP4_BLOCK, CalibrationMethod, LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

W4A16_NVFP4 = Quantizer(
    linear=LinearFormat(algorithm="W4A16_NVFP4", weight=WeightFormat.NVFP4, block_size=NVFP4_BLOCK),
    calibration=CalibrationMethod(method="max"),
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.35, min_top1_agreement=0.66),
)
