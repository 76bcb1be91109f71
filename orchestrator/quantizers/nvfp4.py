"""E2M1 weights and activations in blocks of 16 with E4M3 scales (Blackwell)."""

from __future__ import annotations

from orchestrator.core.quantization import NVFP4_BLOCK, ActivationFormat, CalibrationMethod, LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

NVFP4 = Quantizer(
    linear=LinearFormat(
        algorithm="NVFP4",
        weight=WeightFormat.NVFP4,
        activation=ActivationFormat.NVFP4,
        block_size=NVFP4_BLOCK,
        fuse_gate=True,
    ),
    calibration=CalibrationMethod(method="max"),
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.6, min_top1_agreement=0.58),
)
