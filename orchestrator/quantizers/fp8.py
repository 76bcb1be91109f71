"""E4M3 weights and activations, one static scale each per linear."""

from __future__ import annotations

from orchestrator.core.quantization import ActivationFormat, CalibrationMethod, LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

FP8 = Quantizer(
    linear=LinearFormat(algorithm="FP8", weight=WeightFormat.FP8_TENSOR, activation=ActivationFormat.FP8_TENSOR, fuse_gate=True),
    calibration=CalibrationMethod(method="max"),
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.06, min_top1_agreement=0.86),
)
