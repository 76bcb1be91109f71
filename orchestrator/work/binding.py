"""Bind a rank's weights to the initializers of its graph: memory-mapped bytes where file and graph agree, else converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.base.dtypes import MODEL_DTYPES, numpy_dtype
from orchestrator.base.errors import SourceCorruptError
from orchestrator.model.quantization import FP4_MAX, FP8_MAX, LinearFormat, WeightFormat
from orchestrator.networks import Network
from orchestrator.work.shards import Weight, require

Array = npt.NDArray[Any]
STORED: dict[int, str] = {
    onnx.TensorProto.FLOAT: "F32",
    onnx.TensorProto.FLOAT16: "F16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT8: "I8",
    onnx.TensorProto.UINT8: "U8",
    onnx.TensorProto.INT4: "I8",
    onnx.TensorProto.FLOAT4E2M1: "U8",
    onnx.TensorProto.FLOAT8E4M3FN: "F8_E4M3",
}
"""safetensors dtype in the rank's file, by ONNX dtype of the initializer."""
_CONVERT = "Make the checkpoint again with this version's `orchestrator convert`."


def bind(network: Network, weights: Mapping[str, Weight], dtype: str) -> dict[str, Array]:
    """Return every external initializer of a graph, in the model's dtype. Bytes that already fit are not copied.

    Raises SourceMissingError, SourceCorruptError.
    """
    require(weights, network.weight_names())
    bound = {name: _bind_one(name, weights[name], kind) for name, kind in network.weight_dtypes().items()}
    for name, table in network.tables.items():
        bound[name] = np.ascontiguousarray(table.astype(numpy_dtype(MODEL_DTYPES[dtype])))
    return bound


def _bind_one(name: str, weight: Weight, kind: int) -> Array:
    if kind == onnx.TensorProto.INT4:
        _check(name, weight, "I8")
        return int4_by_columns(weight)
    wanted = STORED[kind]
    if weight.dtype == "F32" and wanted in ("F16", "BF16"):  # scales of INT4 blocks; TensorRT takes them in the model's dtype
        typed = weight.data.view(np.float32).reshape(weight.shape)
        return np.ascontiguousarray(typed.astype(numpy_dtype(wanted)))
    _check(name, weight, wanted)
    return weight.data


def _check(name: str, weight: Weight, wanted: str) -> None:
    if weight.dtype != wanted:
        raise SourceCorruptError(f"{name} is {weight.dtype} in the rank's checkpoint, its graph wants {wanted}", _CONVERT)


def int4_by_columns(weight: Weight) -> npt.NDArray[np.uint8]:
    """Repack nibbles from two rows per byte, [.., out / 2, in], to two columns per byte, [.., out, in / 2], as ONNX packs them."""
    stored = weight.data.reshape(-1, weight.shape[-1])
    even, odd = stored & 0x0F, stored >> 4
    rows = np.empty((2 * len(stored), stored.shape[1] // 2), np.uint8)
    rows[0::2] = even[:, 0::2] | (even[:, 1::2] << 4)
    rows[1::2] = odd[:, 0::2] | (odd[:, 1::2] << 4)
    return rows


class PortableWeights:
    """External initializers of a rank's executed graph, each made on access.

    Floats are widened to float32, which is exact; formats without a standard operator are dequantized.
    """

    def __init__(self, network: Network, weights: Mapping[str, Weight]) -> None:
        """Raises SourceMissingError when the rank's checkpoint lacks a tensor of the network."""
        require(weights, network.weight_names())
        self._network, self._weights = network, weights
        self._dims = {tensor.name: tuple(tensor.dims) for tensor in network.model.graph.initializer}
        self._kinds = network.weight_dtypes()

    def is_widened(self, name: str) -> bool:
        """Whether a weight is stored in 16 or 32 bits and bound in float32."""
        return (
            name not in self._network.tables and name not in self._network.unpacked and self._kinds[name] == onnx.TensorProto.FLOAT
        )

    def stored(self, name: str) -> tuple[Array, int]:
        """Return a floating-point weight as stored, shaped, and its ONNX dtype. Raises SourceCorruptError for other dtypes."""
        weight = self._weights[name]
        kinds = {dtype: kind for kind, dtype in STORED.items() if dtype in ("F32", "F16", "BF16")}
        if weight.dtype not in kinds:
            raise SourceCorruptError(f"{name} is {weight.dtype} in the rank's checkpoint, its graph wants floating point", _CONVERT)
        plain = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[weight.dtype]
        return weight.data.view(plain).reshape(self._dims[name]), kinds[weight.dtype]

    def release(self, names: Iterable[str]) -> None:
        """Take the pages of weights that were bound, or made from, out of this process's memory."""
        for name in names:
            if name in self._weights:
                self._weights[name].release()

    def __getitem__(self, name: str) -> tuple[Array, int]:
        """Return an initializer's value and its ONNX dtype. Raises SourceCorruptError for a wrong stored dtype."""
        if name in self._network.tables:
            return self._network.tables[name], onnx.TensorProto.FLOAT
        kind, dims = self._kinds[name], self._dims[name]
        if name in self._network.unpacked:
            value = _dequantized(name, self._weights, self._network.unpacked[name]).reshape(dims)
        elif kind == onnx.TensorProto.FLOAT:
            value = _widened(*self.stored(name))
        else:
            value = _shaped(_bind_one(name, self._weights[name], kind), kind, dims)
        return np.require(value, requirements="C"), kind


def bind_portable(network: Network, weights: Mapping[str, Weight]) -> dict[str, tuple[Array, int]]:
    """Return every external initializer of a portable graph at once. Raises as `PortableWeights` does."""
    found = PortableWeights(network, weights)
    return {name: found[name] for name in (*network.weight_names(), *network.tables)}


def _widened(stored: Array, kind: int) -> Array:
    if kind != onnx.TensorProto.BFLOAT16:
        wide: Array = stored.astype(np.float32, copy=False)
        return wide
    # bfloat16 is the upper half of a float32.
    bits = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _shaped(value: Array, kind: int, dims: tuple[int, ...]) -> Array:
    """Give bytes the initializer's shape. INT4, two per byte, fills the first half of a buffer of that shape."""
    if kind == onnx.TensorProto.INT4:
        buffer = np.zeros(dims, np.uint8)
        buffer.reshape(-1)[: value.size] = value.reshape(-1)
        return buffer
    return value.view(np.int8 if kind == onnx.TensorProto.INT8 else np.uint8).reshape(dims)


def _dequantized(name: str, weights: Mapping[str, Weight], fmt: LinearFormat) -> Array:
    """Dequantize a weight whose format has no standard operator; float32 [out, in]."""
    import torch

    from orchestrator.quantizers.formats import unpack_rows

    linear = name.removesuffix(".weight")
    weight, scale = weights[name], weights[f"{linear}.weights_scaling_factor"]
    stored = torch.from_numpy(np.array(weight.data)).reshape(-1, weight.shape[-1])
    scales = torch.from_numpy(np.array(scale.data)).reshape(-1, scale.shape[-1])
    if fmt.weight is not WeightFormat.NVFP4:
        return unpack_rows(stored, fmt, scales, None).numpy()
    seconds = weights[f"{linear}.weights_scaling_factor_2"].data.view(np.float32).reshape(-1)
    parts = zip(stored.chunk(len(seconds)), scales.view(torch.float8_e4m3fn).chunk(len(seconds)), seconds, strict=True)
    # unpack_rows takes the amax that the scale was derived from.
    amax = FP4_MAX * FP8_MAX
    return np.concatenate([unpack_rows(part, fmt, blocks, float(second) * amax).numpy() for part, blocks, second in parts])
