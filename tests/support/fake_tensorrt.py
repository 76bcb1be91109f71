"""A TensorRT without a GPU: its builder keeps the graph, its runtime executes it in ONNX Runtime, by TensorRT's rules.

As a backend of orchestrator/engines it "compiles" a rank (build_engine): the engine is the very graph and weights that TensorRT
would get. As a library (`FakeTensorRT`) it enforces what TensorRT demands: a profile before shapes, shapes within the profile,
every tensor bound to enough memory, aliased tensors bound to one address, one communicator per context that all ranks give at once.
The graph is cut at its collectives, which meet the other ranks in fake_nccl.
"""

from __future__ import annotations

import ctypes
import enum
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.base.digest import digest_bytes
from orchestrator.engines import EngineRequest, Profile, installed_version
from orchestrator.engines.record import EngineRecord, TensorRange
from orchestrator.networks.decoder import Network
from orchestrator.networks.slices import Slice, Sliced, cut, executable
from orchestrator.runners.tensorrt.device import Device
from orchestrator.work.verify.ort import element_type, open_session, ort_value, run_session
from tests.support.fake_nccl import Communicator, NCCLError

Array = npt.NDArray[Any]


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT8, FP8 = range(6)

    @property
    def itemsize(self) -> int:
        return {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8}.get(self.name, 1)


_OF_ONNX = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, np.float32), onnx.TensorProto.INT64: (DataType.INT64, np.int64),
    onnx.TensorProto.INT8: (DataType.INT8, np.int8), onnx.TensorProto.FLOAT8E4M3FN: (DataType.FP8, np.uint8),
}  # fmt: skip
"""TensorRT's dtype and numpy's for the bytes, of graphs in float32."""


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 1, 2


@dataclass
class Stored:
    """Content of a fake engine."""

    model: bytes
    weights: dict[str, tuple[Array, int]]
    profiles: tuple[Profile, ...]
    version: str


def build_engine(
    request: EngineRequest,
    write: Callable[[memoryview], object],
    progress: Callable[[str, int, int], None],
    log: Callable[[str], None],
) -> EngineRecord:
    """As EngineBackend."""
    model = onnx.load_from_string(request.model)
    kinds = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer}
    weights = {name: (np.array(value).view(np.uint8), kinds[name][0]) for name, value in request.weights.items()}
    shaped = {
        name: (value.reshape(-1).view(_OF_ONNX[kind][1]).reshape(kinds[name][1]), kind) for name, (value, kind) in weights.items()
    }
    version = installed_version(request.config.backend) or ""
    write(memoryview(pickle.dumps(Stored(request.model, shaped, request.profiles, version))))
    tensors = [_range(value, "input", request.profiles) for value in model.graph.input]
    tensors += [_range(value, "output", ()) for value in model.graph.output]
    return EngineRecord(
        backend=request.config.backend, tensorrt_version=version, compute_capabilities=(),
        profiles=tuple(profile.name for profile in request.profiles), tensors=tuple(tensors),
    )  # fmt: skip


def _range(value: onnx.ValueInfoProto, mode: Any, profiles: tuple[Profile, ...]) -> TensorRange:
    return TensorRange(
        name=value.name,
        dtype=_OF_ONNX[value.type.tensor_type.elem_type][0].name.lower(),
        mode=mode,
        shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        profiles={profile.name: dict(zip(("min", "opt", "max"), profile.shapes[value.name], strict=True)) for profile in profiles},
        aliases=_alias(value),
    )


def _alias(value: onnx.ValueInfoProto) -> str | None:
    """The input that an output is updated in place of: caches in floating point."""
    in_place = value.name.startswith("present_") and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    return value.name.replace("present_", "past_", 1) if in_place else None


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def log(self, severity: Any, message: str) -> None: ...


class Logger(ILogger):
    ERROR = ILogger.Severity.ERROR

    def __init__(self, severity: ILogger.Severity) -> None:
        self.severity = severity


@dataclass
class FakeTensorRT:
    """The module, for one rank and its device."""

    device: Device
    context_class: Any = None
    refuse_communicator: bool = False
    __version__: str = field(default_factory=lambda: installed_version("tensorrt_rtx") or "")

    def __post_init__(self) -> None:
        self.context_class = self.context_class or Context

    ILogger = ILogger
    Logger = Logger
    TensorIOMode = TensorIOMode
    DataType = DataType

    def Runtime(self, logger: ILogger) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(logger, bytes(data)))

    def _engine(self, logger: ILogger, data: bytes) -> Engine | None:
        stored = pickle.load(io.BytesIO(data))
        if stored.version != self.__version__:
            logger.log(ILogger.Severity.ERROR, f"engine of version {stored.version}")
            return None
        return Engine(self, logger, stored)


class Engine:
    """ICudaEngine."""

    def __init__(self, trt: FakeTensorRT, logger: ILogger, stored: Stored) -> None:
        self.trt, self.logger, self.stored = trt, logger, stored
        model = onnx.load_from_string(stored.model)
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        self.all = {**self.inputs, **self.outputs}
        self.sliced: Sliced = cut(Network(model, {}, {}))
        self.opsets = model.opset_import
        self.num_io_tensors = len(self.all)

    def get_tensor_name(self, number: int) -> str:
        return list(self.all)[number]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _OF_ONNX[self.all[name].type.tensor_type.elem_type][0]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, number: int) -> list[tuple[int, ...]]:
        assert name in self.inputs
        return list(self.stored.profiles[number].shapes[name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return _alias(self.outputs[name])

    def create_execution_context(self) -> Context:
        return self.trt.context_class(self)


_SESSIONS: dict[bytes, Any] = {}
_LOCK = threading.Lock()


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._device = engine, engine.trt.device
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._communicator: Any = None

    communicator_at = staticmethod(lambda pointer: Communicator.all[pointer])
    """Return the communicator of a pointer, with `exchange`."""

    def _refuse(self, message: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, message)
        return False

    def set_communicator(self, capsule: Any) -> bool:
        if self._communicator is not None:
            return self._refuse("Main NCCL communicator has already been set")
        if self._engine.trt.refuse_communicator:
            return self._refuse("The engine is not a multi-device engine")
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))(
            capsule, b"ncclComm_t"
        )
        found = self.communicator_at(pointer)
        if found.user is not None:
            return self._refuse("another context uses the communicator")
        found.exchange("meet", None, np.zeros(1, np.float32))
        found.user, self._communicator = self, found
        return True

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream == self._device.stream
        self._profile = number
        self._shapes.clear()
        return number < len(self._engine.stored.profiles) or self._refuse(f"no profile {number}")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            return self._refuse("a shape before the profile")
        lowest, _, highest = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(shape) == len(lowest) and all(
            low <= size <= high for low, size, high in zip(lowest, shape, highest, strict=True)
        )
        if not fits:
            return self._refuse(f"{name} {shape} is outside of {lowest} to {highest}")
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.all:
            return self._refuse(f"no tensor {name}")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._device.stream
        missing = [name for name in self._engine.inputs if name not in self._shapes]
        unbound = [name for name in self._engine.all if name not in self._addresses]
        if missing or unbound:
            return self._refuse(f"without shape: {missing}; without memory: {unbound}")
        for name in (name for name in self._engine.outputs if name.startswith("present_")):
            wanted, source = self._engine.get_aliased_input_tensor(name), name.replace("present_", "past_", 1)
            same = self._addresses[name] == self._addresses[source]
            if same != (wanted is not None):
                return self._refuse(f"{name} and {source} must {'share' if wanted else 'not share'} memory")
        try:
            self._execute()
        except (NCCLError, KeyError, AssertionError) as error:
            return self._refuse(f"{type(error).__name__}: {error}")
        return True

    def _execute(self) -> None:
        engine = self._engine
        values = {name: self._read(name) for name in engine.inputs}
        for part in engine.sliced.slices:
            if part.nodes:
                feeds = [values[name] for name in part.inputs]
                feeds += [ort_value(*engine.stored.weights[name]) for name in part.weights]
                values |= dict(zip(part.outputs, run_session(_session(engine, part, feeds), feeds), strict=True))
            if part.collective is not None:
                if self._communicator is None:
                    raise NCCLError("a collective without a communicator")
                sent = values[part.collective.source].numpy()
                values[part.collective.result] = ort_value(self._communicator.exchange(part.collective.operation, None, sent))
        for name in engine.outputs:
            self._device.upload(self._addresses[name], values[name].numpy())

    def _read(self, name: str) -> Any:
        kind = self._engine.inputs[name].type.tensor_type.elem_type
        dtype, shape = _OF_ONNX[kind][1], self._shapes[name]
        value = np.empty(shape, dtype)
        self._device.download(self._addresses[name], value)
        return ort_value(value, kind)


def _session(engine: Engine, part: Slice, feeds: list[Any]) -> Any:
    model = executable(part, engine.opsets, [element_type(value) for value in feeds]).SerializeToString()
    with _LOCK:
        if model not in _SESSIONS:
            _SESSIONS[model] = open_session(model)
        return _SESSIONS[model]


def spoilt(path: Path, weight: str) -> str:
    """Negate a weight of an engine's file; returns the new sha256."""
    stored = pickle.loads(path.read_bytes())
    value, kind = stored.weights[weight]
    stored.weights[weight] = -value, kind
    path.write_bytes(pickle.dumps(stored))
    return digest_bytes(path.read_bytes())
