"""What is recorded of an engine: its inputs and outputs, its device, and the memory that it needs."""

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
    """A dynamic dimension is its name."""
    profiles: dict[str, dict[str, tuple[Size, ...]]] = Field(default_factory=dict)
    """Inputs only: profile -> min, opt, max."""
    aliases: str | None = None
    """Outputs only: the input whose memory must be bound here too (KV cache). A quantized cache (INT8, FP8) has none: it needs
    two buffers, to be swapped after each call."""


class EngineRecord(Record):
    """What a runtime must know of an engine before it loads it."""

    backend: Literal["tensorrt", "tensorrt_rtx"]
    tensorrt_version: Word
    cuda_version: Word | None = None
    """Of the CUDA that the library was made for: its major version, e.g. 13."""
    gpu_name: Word | None = None
    """tensorrt: the GPU that it was built on, as NVML names it. tensorrt_rtx builds without one."""
    compute_capabilities: tuple[Word, ...]
    """tensorrt: that of the GPU. tensorrt_rtx: the targets; empty: every one that the library supports."""
    profiles: tuple[Word, ...]
    """Names of the optimization profiles, by index."""
    tensors: Annotated[tuple[TensorRange, ...], FailFast()]
    weights_bytes: Count | None = None
    context_bytes: Count | None = None
    """Device memory of an execution context with the most demanding profile; None: TensorRT did not tell."""


class MemoryNeed(Record):
    """What a rank takes of its GPU's memory, besides CUDA itself."""

    engine_bytes: Count
    kv_cache_bytes: Count
    """At the largest batch and sequence."""
    io_bytes: Count
    """Other inputs and outputs, at the largest shapes."""
    context_bytes: Count | None
    total_bytes: Count
