"""Element types of checkpoints: names in safetensors and in TensorRT-LLM, and sizes."""

from __future__ import annotations

ITEM_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""safetensors' name (`Dtype` of safetensors 0.8) -> bits per element."""

MODEL_DTYPES: dict[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Dtypes that a model may have: TensorRT-LLM's name -> safetensors' name."""

MODEL_DTYPE_NAMES: dict[str, str] = {value: key for key, value in MODEL_DTYPES.items()}


def num_bytes(dtype: str, num_elements: int) -> int:
    """Return the size in bytes of `num_elements` packed elements. Raises KeyError for an unknown dtype."""
    bits = ITEM_BITS[dtype] * num_elements
    return (bits + 7) // 8
