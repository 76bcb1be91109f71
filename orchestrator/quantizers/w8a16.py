"""INT8 weights, one scale per output row; activations keep the model's precision. Data-free."""

from __future__ import annotations

from orchestrator.core.quantization import LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

W8A16 = Quantizer(
    linear=LinearFormat(algorithm="W8A16", weight=WeightFormat.INT8_CHANNEL),
    calibration=None,
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.01, min_top1_agreement=0.95),
)
