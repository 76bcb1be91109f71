"""Record of an engine: inputs and outputs, device, and memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field

from orchestrator.base.records import Count, Record, Size, Word


class TensorRange(Record):
    """An input or output of an engine, with the shapes of each optimization profile."""

    name: Word
    dtype: Word
    mode: Literal["input", "output"]
    shape: Annotated[tuple[Size | str, ...], FailFast()]
    """Shape, with the name of each dynamic dimension."""
    profiles: dict[str, dict[str, tuple[Size, ...]]] = Field(default_factory=dict)
    """For inputs: profile -> min, opt, max -> shape."""
    aliases: str | None = None
    """For outputs: name of the input whose memory must also be bound here (KV cache); None: separate memory. A quantized cache
    (INT8, FP8) needs two buffers, which are swapped after each call."""


class EngineRecord(Record):
    """Properties of an engine that a runtime needs before it loads the engine."""

    backend: Literal["tensorrt", "tensorrt_rtx"]
    tensorrt_version: Word
    cuda_version: Word | None = None
    """Major version of the CUDA that the library was built for, e.g. 13."""
    gpu_name: Word | None = None
    """NVML's name of the GPU that built the engine, for tensorrt; None: tensorrt_rtx, which needs no GPU."""
    compute_capabilities: tuple[Word, ...]
    """Capability of the GPU for tensorrt, targets for tensorrt_rtx; empty: every one that the library supports."""
    version_compatible: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether later TensorRT versions of the same major number load the engine too; left out: no."""
    profiles: tuple[Word, ...]
    """Names of the optimization profiles, in TensorRT's order."""
    tensors: Annotated[tuple[TensorRange, ...], FailFast()]
    weights_bytes: Count | None = None
    context_bytes: Count | None = None
    """Device memory of an execution context with the most demanding profile; None: TensorRT did not report it."""


class MemoryNeed(Record):
    """GPU memory that a rank needs, without CUDA itself."""

    engine_bytes: Count
    kv_cache_bytes: Count
    """KV cache at the largest batch and sequence."""
    io_bytes: Count
    """Other inputs and outputs at the largest shapes."""
    context_bytes: Count | None
    total_bytes: Count
