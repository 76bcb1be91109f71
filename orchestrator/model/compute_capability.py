"""GPUs that support the number formats of a quantized model.

The limits were measured with TensorRT-RTX 1.7 and whole models on every capability that it builds for: below them the build
fails after the conversion, with "HW-specific datatypes". They agree with NVIDIA's specifications of the hardware.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator.base.errors import QuantizationError, SpecError
from orchestrator.model.quantization import ActivationFormat, LinearFormat, ModelQuantization, WeightFormat

Capability = tuple[int, int]
"""(major, minor)."""
_AMPERE, _ADA, _BLACKWELL = (8, 0), (8, 9), (10, 0)
_WEIGHTS: dict[WeightFormat, Capability] = {
    WeightFormat.INT4_BLOCK: _AMPERE,
    WeightFormat.INT4_BLOCK_FP8: _ADA,
    WeightFormat.FP8_TENSOR: _ADA,
    WeightFormat.FP8_CHANNEL: _ADA,
    WeightFormat.MXFP8: _ADA,
    WeightFormat.NVFP4: _BLACKWELL,
}
_ACTIVATIONS: dict[ActivationFormat, Capability] = {
    ActivationFormat.FP8_TENSOR: _ADA,
    ActivationFormat.FP8_TOKEN: _ADA,
    ActivationFormat.MXFP8: _ADA,
    ActivationFormat.NVFP4: _BLACKWELL,
}
_ANY: Capability = (0, 0)
_INSTEAD = {
    _AMPERE: "W8A16 or W8A8_SQ_PER_CHANNEL",
    _ADA: "W4A16_AWQ or W8A8_SQ_PER_CHANNEL",
    _BLACKWELL: "FP8 or W4A16_AWQ",
}
"""Algorithms to use on GPUs below each capability."""


def check_target(quantization: ModelQuantization | None, compute_capabilities: Sequence[str]) -> None:
    """Check that every target GPU supports the model's number formats. Empty capabilities: the library's own choice.

    Raises QuantizationError for a GPU that does not, with alternatives, and SpecError for a malformed capability.
    """
    targets = {text: parse(text) for text in compute_capabilities}
    for what, least, instead in _needs(quantization) if quantization else ():
        old = [text for text, target in targets.items() if target < least]
        if old:
            raise QuantizationError(
                f"{what} needs compute capability {least[0]}.{least[1]} or newer, engine.compute_capabilities has {', '.join(old)}",
                f"Leave {', '.join(old)} out of engine.compute_capabilities, or use {instead} there.",
            )


def parse(text: str) -> Capability:
    """Return (8, 9) for 8.9, sm89 or SM_89. Raises SpecError for any other text."""
    digits = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", text.lower())
    if digits is None:
        raise SpecError(f"engine.compute_capabilities: {text!r} is not a compute capability", "Write them as 8.9 or 12.0.")
    return int(digits[1]), int(digits[2])


def _needs(quantization: ModelQuantization) -> list[tuple[str, Capability, str]]:
    """Return (format, least capability, alternative) for every format of the model."""
    formats = [(fmt.algorithm, _least(fmt)) for fmt in quantization.formats()]
    found = [(algorithm, least, _INSTEAD[least]) for algorithm, least in formats if least != _ANY]
    if quantization.kv_cache == "FP8":
        found.append(("an FP8 KV cache", _ADA, "kv_cache: INT8"))
    return found


def _least(fmt: LinearFormat) -> Capability:
    return max(_WEIGHTS.get(fmt.weight, _ANY), _ACTIVATIONS.get(fmt.activation, _ANY))
