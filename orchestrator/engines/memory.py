"""GPU memory that an engine needs, from its record alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.engines.record import EngineRecord, MemoryNeed, TensorRange

_BITS = {
    "float": 32, "float32": 32, "half": 16, "float16": 16, "bf16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "bool": 8, "fp8": 8,
    "e8m0": 8, "int32": 32, "int64": 64, "int4": 4, "fp4": 4,
}  # fmt: skip
"""Dtype -> bits per element, by TensorRT's names in lower case and by usual names."""
CACHE_PREFIX = "past_key_values."
"""Prefix of the names of the KV cache's inputs."""


def memory_needed(engine: EngineRecord, engine_bytes: int) -> MemoryNeed:
    """Return the memory at the largest shapes of any profile. The KV cache is the inputs past_key_values.*, which outputs alias.

    `engine_bytes`: size of the serialized engine, which contains the weights.
    """
    dims = largest_dims(engine)
    cache = outside = 0
    for tensor in engine.tensors:
        if tensor.aliases is None:
            size = tensor_bytes(tensor, dims)
            cache, outside = (cache + size, outside) if tensor.name.startswith(CACHE_PREFIX) else (cache, outside + size)
    total = engine_bytes + cache + outside + (engine.context_bytes or 0)
    return MemoryNeed(
        engine_bytes=engine_bytes, kv_cache_bytes=cache, io_bytes=outside, context_bytes=engine.context_bytes, total_bytes=total
    )


def largest_dims(engine: EngineRecord) -> dict[str, int]:
    """Return the largest size of every named dimension."""
    dims: dict[str, int] = {}
    for tensor in engine.tensors:
        for shapes in tensor.profiles.values():
            for name, size in zip(tensor.shape, shapes["max"], strict=True):
                if isinstance(name, str):
                    dims[name] = max(dims.get(name, 0), size)
    return dims


def tensor_bytes(tensor: TensorRange, dims: Mapping[str, int]) -> int:
    """Return the size at the largest shape. A dimension that no input has counts as one."""
    sizes = [dims.get(size, 1) if isinstance(size, str) else size for size in tensor.shape]
    return -(-math.prod(sizes) * _BITS.get(tensor.dtype, 32) // 8)
