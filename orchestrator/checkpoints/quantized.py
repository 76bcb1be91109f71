"""Refusal of sources that are already quantized, with advice for each tool that may have written them.

Detects the tools by `quantization_config` of config.json and by files beside it, not by tensors. Quantizing twice would add both
errors, and the cuts over ranks do not fit the packed layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.base.errors import QuantizationError

_ORIGINAL = "Build from the unquantized checkpoint"
_DEQUANTIZE = f"{_ORIGINAL}, or write one with transformers: from_pretrained(...).dequantize(), then save_pretrained."
_METHODS: dict[str, tuple[str, str]] = {
    "fbgemm_fp8": (
        "FBGEMM FP8: float8 weights with a scale per row",
        f"{_ORIGINAL}: for Meta's Llama models it is the repository of the same name without -FP8.",
    ),
    "fp8": (
        "FP8 with a scale per block of weights",
        f"{_ORIGINAL}. Publishers that release float8 alone give a script that casts to bfloat16 (DeepSeek: fp8_cast_bf16.py).",
    ),
    "awq": ("AWQ: 4-bit weights with scales per group", f"{_ORIGINAL}: the model that the AWQ repository names as its base."),
    "gptq": ("GPTQ: packed weights with scales per group", f"{_ORIGINAL}: the model that the GPTQ repository names as its base."),
    "compressed-tensors": (
        "compressed-tensors, as llm-compressor writes",
        f"{_ORIGINAL}: the recipe's model, named in the repository's card.",
    ),
    "bitsandbytes": ("bitsandbytes: weights of 8 or 4 bits", _DEQUANTIZE),
    "mxfp4": (
        "MXFP4: 4-bit weights with a scale per 32",
        "Write a bfloat16 checkpoint with transformers: Mxfp4Config(dequantize=True).",
    ),
    "modelopt": ("Model Optimizer's unified export", f"{_ORIGINAL} that was given to Model Optimizer."),
}
"""Value of quantization_config.quant_method -> description, advice."""
_ACTIVATION_ORDER = (
    "GPTQ with desc_act=True: rows of a group are scattered over the input (activation order), so no rank could hold whole groups",
    f"{_ORIGINAL}: the model that the GPTQ repository names as its base.",
)
_MARKS = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""Files that early versions of Model Optimizer, AutoGPTQ and AutoAWQ wrote instead of a key in config.json -> quant_method."""


def refuse_quantized(url: str, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a quantized Hugging Face folder, by its config.json and file names. Raises QuantizationError."""
    found = config.get("quantization_config") or config.get("compression_config")
    marks = [mark for mark in _MARKS if mark in names]
    if found:
        method = _method(found)
        kind, advice = _describe(method, found if isinstance(found, dict) else {})
        raise QuantizationError(f"{url} is already quantized ({method}): {kind}", advice)
    if marks:
        method = _MARKS[marks[0]]
        kind, advice = _METHODS[method]
        raise QuantizationError(f"{url} is already quantized ({method}): {kind}. Its {marks[0]} says so", advice)


def _method(found: Any) -> str:
    """Return the name of the method. Configs of the first bitsandbytes models have only its switches."""
    if not isinstance(found, dict):
        return str(found)
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or ("modelopt" if found.get("quant_algo") else "unknown"))


def _describe(method: str, found: Mapping[str, Any]) -> tuple[str, str]:
    if method == "gptq" and found.get("desc_act"):
        return _ACTIVATION_ORDER
    return _METHODS.get(method, ("an unknown method", f"{_ORIGINAL}."))
