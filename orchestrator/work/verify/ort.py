"""ONNX Runtime sessions and values for executing a rank's graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
_WITHOUT_NUMPY = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT4, onnx.TensorProto.BFLOAT16}


def empty_cache(shape: RankShape, batch: int, slots: int) -> Any:
    """Return an initial cache: a large number, so that reading an unwritten slot gives a wrong result."""
    size = (batch, shape.num_kv_heads, slots, shape.config.head_size)
    dtype, value, kind = _LARGE[shape.cache_dtype]
    return ort_value(np.full(size, value, dtype), kind)


def ort_value(value: Array, kind: int = onnx.TensorProto.UNDEFINED) -> Any:
    """Wrap a tensor for ONNX Runtime without a copy. `kind`: ONNX dtype of elements for which numpy has none."""
    import onnxruntime

    if kind in _WITHOUT_NUMPY:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)


def open_session(model: bytes, bound: Mapping[str, Any] | None = None) -> Any:
    """Open a session on the CPU. `bound`: external initializers, whose memory the caller must keep."""
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
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
