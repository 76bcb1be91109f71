"""E4M3 weights with a scale per output row, activations with one per token, computed at run time. Data-free."""

from __future__ import annotations

from orchestrator.core.quantization import ActivationFormat, LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

FP8_PER_CHANNEL_PER_TOKEN = Quantizer(
    linear=LinearFormat(
        algorithm="FP8_PER_CHANNEL_PER_TOKEN", weight=WeightFormat.FP8_CHANNEL, activation=ActivationFormat.FP8_TOKEN
    ),
    calibration=None,
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.06, min_top1_agreement=0.86),
)
