"""The engine of one rank: loaded, bound to memory, and executed call by call."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.base.errors import DigestError, EngineRunError, MachineError
from orchestrator.engines.memory import CACHE_PREFIX, largest_dims, tensor_bytes
from orchestrator.engines.profiles import DECODE, PREFILL
from orchestrator.engines.record import EngineRecord, TensorRange
from orchestrator.releases.machine import loads
from orchestrator.releases.manifest import FileRecord, RankRecord
from orchestrator.runners.tensorrt.device import Array, Device

_MAX_ERRORS = 3


class RankEngine:
    """An engine and its only execution context. One context serves both profiles, so that the caches are its alone."""

    def __init__(self, record: RankRecord, folder: Path, trt: Any, device: Device, communicator: Any = None) -> None:
        """Load the rank's engine from a pulled release, check it and allocate its inputs and outputs.

        `communicator`: capsule of the stage's NCCL communicator; None: the stage has one rank. Blocks until all ranks of the stage
        have come. Raises DigestError, MachineError, EngineRunError.
        """
        self._record, self._trt, self._device = record.engine, trt, device
        _check_version(record.engine, trt)
        device.use()
        self._logger = _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        (file,) = (file for file in record.files if file.role == "engine")
        self._engine = self._load(file, folder / file.path)
        self._check_tensors()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._error("TensorRT gave no execution context")
        if communicator is not None and not self._context.set_communicator(communicator):
            raise EngineRunError(
                f"TensorRT refused the communicator of rank {record.rank}: {self._reason()}",
                "Without it the ranks would not exchange, and every result would be wrong. Build with TensorRT 11.2 or newer: "
                "11.0 and 11.1 can drop the collectives of an engine.",
            )
        self._profile: str | None = None
        self._addresses: dict[str, int] = {}
        self._swapped: list[tuple[str, str]] = []
        """Inputs and outputs of caches that are written as a whole, which swap their memory after every call."""
        self._allocate()

    def _load(self, file: FileRecord, path: Path) -> Any:
        """Deserialize the file once its digest is right: engines of ranks of one stage differ in nothing but their bytes."""
        try:
            with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = hashlib.sha256(data).hexdigest()
                if found != file.sha256:
                    raise DigestError(f"{path} has sha256 {found}, published was {file.sha256}")
                engine = self._runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:
            raise EngineRunError(f"{path} cannot be read: {error}", "Pull the release again.") from error
        if engine is None:
            raise self._error(f"TensorRT cannot load {path}")
        return engine

    def _check_tensors(self) -> None:
        """Compare inputs, outputs and profiles with the manifest's. Raises EngineRunError."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        found = {
            name: (engine.get_tensor_dtype(name).name.lower(), engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
            for name in names
        }
        stated = {tensor.name: (tensor.dtype, tensor.mode == "input") for tensor in self._record.tensors}
        different = sorted(name for name in found.keys() | stated.keys() if found.get(name) != stated.get(name))
        for tensor in self._record.tensors:
            for number, profile in enumerate(self._record.profiles):
                if profile in tensor.profiles and tensor.name in found:
                    shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, number)]
                    if shapes != [tensor.profiles[profile][which] for which in ("min", "opt", "max")]:
                        different.append(f"{tensor.name} in {profile}")
        if different:
            raise EngineRunError(
                f"the engine is not the one that the manifest describes: {', '.join(different[:5])}", "Pull the release again."
            )

    def _allocate(self) -> None:
        """Allocate every input and output at its largest shape. A cache's output gets its input's memory where TensorRT says so."""
        dims = largest_dims(self._record)
        inputs = {tensor.name: tensor for tensor in self._record.tensors if tensor.mode == "input"}
        for tensor in self._record.tensors:
            aliased = None if tensor.name in inputs else self._engine.get_aliased_input_tensor(tensor.name)
            if aliased is None:
                self._addresses[tensor.name] = self._device.allocate(tensor_bytes(tensor, dims))
            else:
                self._addresses[tensor.name] = self._addresses[aliased]
            past = tensor.name.replace("present_", "past_", 1)
            if aliased is None and tensor.name not in inputs and past.startswith(CACHE_PREFIX) and past in inputs:
                self._swapped.append((past, tensor.name))

    def run(self, arrays: Mapping[str, Array], dims: Mapping[str, int]) -> None:
        """Start one call. Names that are no inputs of this stage are ignored.

        `dims`: batch, tokens and logit_tokens of the call. Raises EngineRunError.
        """
        self._choose(DECODE if dims["tokens"] == 1 and DECODE in self._record.profiles else PREFILL)
        for tensor in self._record.tensors:
            if tensor.mode == "input":
                shape = _shape(tensor, dims)
                self._must(self._context.set_input_shape(tensor.name, shape), f"the shape {shape} of {tensor.name}")
                if tensor.name in arrays:
                    self._device.upload(self._addresses[tensor.name], arrays[tensor.name])
            self._must(self._context.set_tensor_address(tensor.name, self._addresses[tensor.name]), f"an address of {tensor.name}")
        self._device.use()
        self._must(self._context.execute_async_v3(self._device.stream), "the call")
        for past, present in self._swapped:
            self._addresses[past], self._addresses[present] = self._addresses[present], self._addresses[past]

    def _choose(self, profile: str) -> None:
        if profile != self._profile:
            number = self._record.profiles.index(profile)
            self._must(self._context.set_optimization_profile_async(number, self._device.stream), f"the profile {profile}")
            self._profile = profile

    def memory(self, name: str, dims: Mapping[str, int]) -> tuple[int, int]:
        """Return address and bytes of an input or output at the dims of a call."""
        tensor = next(tensor for tensor in self._record.tensors if tensor.name == name)
        return self._addresses[name], tensor_bytes(tensor, dims)

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise self._error(f"TensorRT refused {what}")

    def _error(self, message: str) -> EngineRunError:
        return EngineRunError(f"{message}: {self._reason()}")

    def _reason(self) -> str:
        return " | ".join(self._logger.errors[-_MAX_ERRORS:]) or "it gave no reason"


def _shape(tensor: TensorRange, dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dims[size] if isinstance(size, str) else size for size in tensor.shape)


def _check_version(record: EngineRecord, trt: Any) -> None:
    if not loads(record, trt.__version__):
        raise MachineError(
            f"this process has {record.backend} {trt.__version__}, the engine was built by {record.tensorrt_version}",
            "Install the version that built the engine, or build the release again with this one.",
        )


def _logger(trt: Any) -> Any:
    class ErrorLogger(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        """Keeps TensorRT's errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return ErrorLogger()
