"""OCP microscaling: E4M3 with a power-of-two scale per 32 input features, of weights and activations. Data-free."""

from __future__ import annotations

from orchestrator.core.quantization import MXFP8_BLOCK, ActivationFormat, LinearFormat, WeightFormat
from orchestrator.core.spec import ToleranceSpec
from orchestrator.quantizers.quantizer import Quantizer

MXFP8 = Quantizer(
    linear=LinearFormat(algorithm="MXFP8", weight=WeightFormat.MXFP8, activation=ActivationFormat.MXFP8, block_size=MXFP8_BLOCK),
    calibration=None,
    tolerance=ToleranceSpec(max_relative_error=None, max_mean_kl=0.06, min_top1_agreement=0.86),
)
