"""Element types of checkpoints: names in safetensors and in TensorRT-LLM, and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

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


ARRAY_NAMES: dict[str, str] = {
    "BOOL": "uint8", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""safetensors' name -> name in torch, and in numpy with ml_dtypes. Packed types, with several elements per byte, have none."""


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of safetensors' name. Raises KeyError for a packed or unknown dtype."""
    import ml_dtypes  # noqa: F401  # gives numpy the names of bfloat16 and of the float8 types
    import numpy as np

    return np.dtype(ARRAY_NAMES[dtype])


def num_bytes(dtype: str, num_elements: int) -> int:
    """Return the size in bytes of `num_elements` packed elements. Raises KeyError for an unknown dtype."""
    bits = ITEM_BITS[dtype] * num_elements
    return (bits + 7) // 8
