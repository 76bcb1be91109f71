"""The quantizers: one algorithm per file, each a fully specified value, and the table of them.

A user picks a name of TensorRT-LLM's (QuantAlgo); what follows from it, the storage of a linear, the calibration that it
needs and the tolerance of its verification, stands in the algorithm's file.
"""

from __future__ import annotations

from orchestrator.quantizers.fp8 import FP8
from orchestrator.quantizers.fp8_per_channel_per_token import FP8_PER_CHANNEL_PER_TOKEN
from orchestrator.quantizers.mxfp8 import MXFP8
from orchestrator.quantizers.nvfp4 import NVFP4
from orchestrator.quantizers.quantizer import Quantizer
from orchestrator.quantizers.resolve import model_quantization, tolerance
from orchestrator.quantizers.w4a8_awq import W4A8_AWQ
from orchestrator.quantizers.w4a16 import W4A16
from orchestrator.quantizers.w4a16_awq import W4A16_AWQ
from orchestrator.quantizers.w4a16_nvfp4 import W4A16_NVFP4
from orchestrator.quantizers.w8a8_sq_per_channel import W8A8_SQ_PER_CHANNEL
from orchestrator.quantizers.w8a16 import W8A16

__all__ = ["QUANTIZERS", "Quantizer", "model_quantization", "tolerance"]

QUANTIZERS: dict[str, Quantizer] = {
    quantizer.linear.algorithm: quantizer
    for quantizer in (
        W8A16, W4A16, FP8_PER_CHANNEL_PER_TOKEN, MXFP8,
        FP8, W8A8_SQ_PER_CHANNEL, W4A16_AWQ, W4A8_AWQ, NVFP4, W4A16_NVFP4,
    )
}  # fmt: skip
"""By the algorithm's name; data-free ones first."""
