"""How a source says that it is quantized, and refusal of the methods that are not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.base.errors import QuantizationError
from orchestrator.checkpoints.quantized.recipes import READ

_ORIGINAL = "Build from the unquantized checkpoint"
_DEQUANTIZE = f"{_ORIGINAL}, or write one with transformers: from_pretrained(...).dequantize(), then save_pretrained."
_REFUSED: dict[str, tuple[str, str]] = {"bitsandbytes": ("bitsandbytes: weights of 8 or 4 bits", _DEQUANTIZE)}
"""Known methods that are not read -> description, advice."""
MARKS = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""Files that early versions of Model Optimizer, AutoGPTQ and AutoAWQ wrote instead of a key in config.json -> quant_method."""


@dataclass(frozen=True, slots=True)
class Described:
    """A source's description of its quantization."""

    method: str
    """quant_method, one of READ."""
    content: Mapping[str, Any]
    where: str
    """File, and key in it."""


def described(url: str, config: Mapping[str, Any], mark: str, content: Mapping[str, Any]) -> Described | None:
    """Return the description of a Hugging Face folder's quantization; None: it is not quantized.

    `mark`: name of the file of MARKS beside config.json, empty if there is none; `content`: what it holds. Raises
    QuantizationError for a method that is not read.
    """
    key = next((name for name in ("quantization_config", "compression_config") if config.get(name)), "")
    found: Any = config.get(key) if key else None
    where = f"{url}/config.json: {key}"
    if not key:
        if not mark:
            return None
        found, where = content, f"{url}/{mark}"
    method = _method(found) if key else MARKS[mark]
    if not isinstance(found, dict) or method not in READ:
        kind, advice = _REFUSED.get(method, ("an unknown method", f"{_ORIGINAL}."))
        raise QuantizationError(f"{url} is quantized by a method that is not read ({method}): {kind}", advice)
    return Described(method, found, where)


def mark_of(names: Sequence[str]) -> str:
    """Return the file of MARKS that is among a folder's files; empty: none."""
    return next((mark for mark in MARKS if mark in names), "")


def _method(found: Any) -> str:
    """Return the name of the method. Configs of the first bitsandbytes models have only its switches."""
    if not isinstance(found, dict):
        return str(found)
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or ("modelopt" if found.get("quant_algo") else "unknown"))
