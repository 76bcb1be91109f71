"""ONNX Runtime sessions and values for executing a rank's graph."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.networks.shape import RankShape

Array = npt.NDArray[Any]
_LARGE: dict[str, tuple[Any, int, int]] = {
    "float32": (np.float32, 10_000, onnx.TensorProto.FLOAT),
    "int8": (np.int8, 127, onnx.TensorProto.INT8),
    "float8": (np.uint8, 0x7E, onnx.TensorProto.FLOAT8E4M3FN),  # 448
}
"""numpy dtype of a cache, bits of a large number, ONNX dtype; by dtype of the KV cache."""
CUDA = "CUDAExecutionProvider"
_NUMPY = {kind: dtype for dtype, _, kind in _LARGE.values()}
_WITHOUT_NUMPY = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT4, onnx.TensorProto.BFLOAT16}


def empty_cache(shape: RankShape, batch: int, slots: int) -> Any:
    """Return an initial cache: a large number, so that reading an unwritten slot gives a wrong result."""
    size = (batch, shape.num_kv_heads, slots, shape.cache_head_size)
    dtype, value, kind = _LARGE[shape.cache_dtype]
    return ort_value(np.full(size, value, dtype), kind)


def first_rows(cache: Any, count: int) -> Any:
    """Return a copy of the first `count` sequences of a cache on the CPU."""
    dtype, kind = np.dtype(_NUMPY[cache.element_type()]), cache.element_type()
    batch, *rest = cache.shape()
    size = count * math.prod(rest) * dtype.itemsize
    stored = np.ctypeslib.as_array(ctypes.cast(cache.data_ptr(), ctypes.POINTER(ctypes.c_uint8)), (size,))
    return ort_value(stored.copy().view(dtype).reshape(min(count, batch), *rest), kind)


def ort_value(value: Array, kind: int = onnx.TensorProto.UNDEFINED) -> Any:
    """Wrap a tensor for ONNX Runtime without a copy. `kind`: ONNX dtype of elements for which numpy has none."""
    import onnxruntime

    if kind in _WITHOUT_NUMPY:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)


def open_session(model: bytes, bound: Mapping[str, Any] | None = None, device: str = "cpu") -> Any:
    """Open a session on cpu or cuda. `bound`: external initializers, whose memory the caller must keep."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # An arena would keep the largest intermediate values of every session.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Otherwise a weight-only MatMul is fused into a kernel that rounds its input to int8.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if bound:
        options.add_external_initializers(list(bound), list(bound.values()))
    # TF32 would round every factor of a product to 10 bits.
    gpu = [(CUDA, {"use_tf32": "0"})] if device == "cuda" else []
    return onnxruntime.InferenceSession(model, options, providers=[*gpu, "CPUExecutionProvider"])


def run_session(session: Any, feeds: Sequence[Any]) -> list[Any]:
    """Run with OrtValues, or float32 tensors of torch on a GPU, by the session's inputs. Returns OrtValues on the CPU."""
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    if CUDA not in session.get_providers():
        results: list[Any] = session.run_with_ort_values(outputs, dict(zip(names, feeds, strict=True)))
        return results
    binding = session.io_binding()
    for name, feed in zip(names, feeds, strict=True):
        if _is_on_gpu(feed):
            binding.bind_input(name, "cuda", feed.get_device(), np.float32, tuple(feed.shape), feed.data_ptr())
        else:
            binding.bind_ortvalue_input(name, feed)
    for name in outputs:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    bound: list[Any] = binding.get_outputs()
    return bound


def widened_on_gpu(stored: Array, kind: int) -> Any:
    """Return a weight as a float32 tensor of torch on the GPU: its stored bytes travel, and are widened there."""
    import torch

    plain: dict[int, Any] = {
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.FLOAT: torch.float32,
    }
    travelling = torch.empty(stored.shape, dtype=plain[kind], pin_memory=True)
    travelling.view(torch.uint8).numpy().reshape(-1)[:] = stored.reshape(-1).view(np.uint8)
    wide = travelling.to("cuda").float()
    torch.cuda.synchronize()  # ONNX Runtime has a stream of its own
    return wide


def element_type(value: Any) -> int:
    """Return the ONNX dtype of a value that `run_session` takes."""
    return int(onnx.TensorProto.FLOAT if _is_on_gpu(value) else value.element_type())


def _is_on_gpu(value: Any) -> bool:
    return hasattr(value, "data_ptr") and not hasattr(value, "element_type")
