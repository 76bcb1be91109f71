"""The GPU of a rank: memory by address, copies, and one stream. The real one is CUDA's runtime by its own Python bindings."""

from __future__ import annotations

import importlib
import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import EngineRunError

Array = npt.NDArray[Any]
_POLL_SECONDS = 2e-5


class Device(Protocol):
    """Memory and one stream of a GPU. Copies and kernels are done in the order in which they were asked for."""

    stream: int
    """Handle of the stream (cudaStream_t)."""

    def use(self) -> None:
        """Make it the current GPU of this thread, for the next library that is called: others may have chosen another."""
        ...

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new memory, filled with zeros."""
        ...

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to the GPU. The array may be changed afterwards."""
        ...

    def download(self, address: int, array: Array) -> None:
        """Wait for everything that was asked for, and copy from the GPU into a contiguous array."""
        ...

    def buffer(self, address: int, num_bytes: int) -> Any:
        """Return memory of the GPU as an object that NCCL's binding takes."""
        ...

    def wait(self) -> None:
        """Wait for everything that was asked for. Raises EngineRunError after the device's time limit."""
        ...

    def close(self) -> None:
        """Free all memory and the stream."""
        ...


class CudaDevice:
    """A GPU of this machine, current in the calling thread."""

    def __init__(self, number: int = 0, seconds: float = 600.0) -> None:
        """`number` among the visible GPUs. `seconds`: time limit of `wait`, because a missing rank would be waited for without end.

        Raises EngineRunError when there is no such GPU.
        """
        self._cuda = importlib.import_module("cuda.bindings.runtime")
        self._seconds = seconds
        self._allocated: list[int] = []
        self._number = number
        # The default stream would make TensorRT synchronize the whole device.
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def allocate(self, num_bytes: int) -> int:
        address = int(self._call("cudaMalloc", num_bytes))
        self._allocated.append(address)
        self._call("cudaMemsetAsync", address, 0, num_bytes, self.stream)
        return address

    def upload(self, address: int, array: Array) -> None:
        plain = np.ascontiguousarray(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        # CUDA copies pageable memory aside before the call returns.
        self._call("cudaMemcpyAsync", address, plain.ctypes.data, plain.nbytes, kind, self.stream)

    def download(self, address: int, array: Array) -> None:
        self.wait()
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.wait()

    def buffer(self, address: int, num_bytes: int) -> Any:
        # By the CUDA array interface, cuda-bindings up to 13.5 takes every address for one of the first GPU (cuda-python 2752).
        return importlib.import_module("cuda.core").Buffer.from_handle(address, num_bytes)

    def wait(self) -> None:
        end = time.monotonic() + self._seconds
        while True:
            (status,) = self._cuda.cudaStreamQuery(self.stream)
            if status == self._cuda.cudaError_t.cudaSuccess:
                return
            if status != self._cuda.cudaError_t.cudaErrorNotReady:
                raise EngineRunError(f"the GPU failed: {status.name}")
            if time.monotonic() > end:
                raise EngineRunError(f"the GPU did not finish within {self._seconds:g} seconds: another rank may have ended")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        for address in self._allocated:
            self._cuda.cudaFree(address)
        self._allocated = []
        if self.stream:
            self._cuda.cudaStreamDestroy(self.stream)
            self.stream = 0

    def use(self) -> None:
        self._check("cudaSetDevice", self._cuda.cudaSetDevice(self._number)[0])

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; returns its only result, or None. Raises EngineRunError."""
        self.use()
        status, *results = getattr(self._cuda, name)(*arguments)
        self._check(name, status)
        return results[0] if results else None

    def _check(self, name: str, status: Any) -> None:
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise EngineRunError(f"{name} failed: {status.name}")
