"""Codes and scales of a quantized source in another layout, with the same values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from orchestrator.base.dtypes import numpy_dtype
from orchestrator.base.errors import QuantizationError
from orchestrator.checkpoints.quantized.decoding import nibbles
from orchestrator.model.checkpoint import Encoding, Stored, TensorInfo, View
from orchestrator.stores.source import ByteSource

Bytes = npt.NDArray[np.uint8]
_BIAS = 127
"""Exponent bias of E8M0."""
_LARGEST, _SMALLEST = 8, -9
"""Exponents of the largest and smallest powers of two of E4M3."""


class Recoder:
    """Reads rows of tensors that are a view of a quantized weight. Power-of-two scales are read once per joined weights."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._exponents: dict[tuple[int, int], Bytes] = {}
        self._scale: dict[tuple[int, int], np.float32] = {}

    def read(self, tensor: TensorInfo, begin: int, end: int, out: memoryview) -> None:
        """Fill `out` with rows [begin, end) of the tensor. Raises QuantizationError for scales that E4M3 cannot hold."""
        encoding = tensor.encoding
        assert encoding is not None
        match encoding.view:
            case View.ROW_PAIRS:
                result = self._row_pairs(encoding, tensor.shape[1], begin, end)
            case View.ROW_SCALES:
                result = np.full(end - begin, self._one(encoding.scale), np.float32).view(np.uint8)
            case View.E4M3_SCALES:
                result = self._e4m3(tensor, encoding, begin, end)
            case _:
                result = np.array([2.0 ** self._second(encoding)], np.float32).view(np.uint8)
                for peer in encoding.peers:  # a target's last read of them
                    self._exponents.pop((peer.file, peer.offset), None)
        out[:] = result.reshape(-1).data

    def _row_pairs(self, encoding: Encoding, inner: int, begin: int, end: int) -> Bytes:
        width = encoding.codes.num_bytes // encoding.codes.shape[0]
        raw = np.empty((2 * (end - begin), width), np.uint8)
        self._source.read_into(encoding.codes.file, encoding.codes.offset + 2 * begin * width, raw.reshape(-1).data)
        # An offset of 8 is two's complement with the highest bit turned over.
        signed = nibbles(raw)[:, :inner] ^ np.uint8(encoding.offset)
        pairs: Bytes = signed[0::2] | (signed[1::2] << np.uint8(4))
        return pairs

    def _one(self, stored: Stored) -> np.float32:
        key = stored.file, stored.offset
        if key not in self._scale:
            data = bytearray(stored.num_bytes)
            self._source.read_into(stored.file, stored.offset, memoryview(data))
            self._scale[key] = np.float32(np.frombuffer(data, numpy_dtype(stored.dtype))[0])
        return self._scale[key]

    def _all(self, stored: Stored) -> Bytes:
        key = stored.file, stored.offset
        if key not in self._exponents:
            data = np.empty(stored.num_bytes, np.uint8)
            self._source.read_into(stored.file, stored.offset, data.data)
            self._exponents[key] = data
        return self._exponents[key]

    def _second(self, encoding: Encoding) -> int:
        """Return the exponent of the peers' common scale. Blocks of zeros have exponent 0 and do not count.

        Source: `mxfp4_to_nvfp4_global_amax` of Model Optimizer.
        """
        largest = max(int(self._all(peer).max(initial=0)) for peer in encoding.peers)
        return (largest - _BIAS if largest else 0) - _LARGEST

    def _e4m3(self, tensor: TensorInfo, encoding: Encoding, begin: int, end: int) -> Bytes:
        exponents = self._all(encoding.scale).reshape(tensor.shape[0], -1)[begin:end].astype(np.int32)
        relative = exponents - _BIAS - self._second(encoding)
        relative[exponents == 0] = _SMALLEST
        if (relative < _SMALLEST).any():
            raise QuantizationError(
                f"{tensor.name} has scales of 2**{int(relative.min()) - _LARGEST} of the largest of its linear, E4M3 holds 2**-17",
                "Exclude this linear (quantization.exclude), or leave `algorithm: source` out, to dequantize.",
            )
        stored: Bytes = np.exp2(relative.astype(np.float32)).astype(numpy_dtype("F8_E4M3")).view(np.uint8)
        return np.repeat(stored, 2, axis=1)
