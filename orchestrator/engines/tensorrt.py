"""Both TensorRT libraries: `tensorrt` for data-centre GPUs, and `tensorrt_rtx`, which builds without a GPU. They share one API.

Weights are bound from the memory-mapped shard by address (`OnnxParser.load_initializer`) without a copy, their pages are released
while TensorRT builds, and the serialized engine is streamed out.
Engine bytes differ from build to build, because tactics are chosen by timing.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from orchestrator.base.errors import EngineBuildError, SpecError, ToolError
from orchestrator.engines import EngineRequest, Profile, cuda_version, library
from orchestrator.engines.device import visible_gpus
from orchestrator.engines.record import EngineRecord, TensorRange
from orchestrator.spec.build import BuildConfig

_VERBOSITY = {"layer_names_only": "LAYER_NAMES_ONLY", "detailed": "DETAILED", "none": "NONE"}
_MAX_ERRORS = 5
_RELEASE_SECONDS = 0.1
_MEMORY = re.compile(r"Total (Device Persistent|Activation|Weights) Memory: (\d+) bytes")


def build_engine(
    request: EngineRequest,
    write: Callable[[memoryview], object],
    progress: Callable[[str, int, int], None],
    log: Callable[[str], None],
) -> EngineRecord:
    """Compile an engine, as EngineBackend describes."""
    trt = library(request.config.backend)
    guard = Guard()
    logger = _logger(trt, guard.around(log))
    builder = trt.Builder(logger)
    if builder is None:
        raise ToolError(f"{request.config.backend} cannot start", "It needs a GPU of the target type and its driver.")
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parse(parser, request)
    guard.check()
    _allow_decomposed_attention(trt, network)
    if request.config.refit:
        mark_refittable(network, request.weights)
    config = builder.create_builder_config()
    _configure(trt, config, request.config)
    for profile in request.profiles:
        _add_profile(builder, config, network, profile)
    # Python objects handed to TensorRT must outlive the build.
    monitor, stream = _monitor(trt, guard, guard.around(progress)), _stream(trt, guard, guard.around(write))
    config.progress_monitor = monitor
    with _releasing(request.release):
        built = builder.build_serialized_network_to_stream(network, config, stream)
    guard.check()
    if not built or not stream.num_bytes:
        raise EngineBuildError(f"{request.config.backend} could not build the engine: " + _last_errors(logger))
    return _record(trt, network, request, logger.reported)


@contextlib.contextmanager
def _releasing(release: Callable[[], object]) -> Iterator[None]:
    """Release pages of weights again and again: TensorRT reads all of them before it copies the first."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(_RELEASE_SECONDS):
            release()

    thread = threading.Thread(target=repeat, name="release", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release()


class Guard:
    """Keeps the first exception, Ctrl-C included, of Python code that TensorRT calls: native code would drop it and continue."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def around(self, function: Callable[..., object]) -> Callable[..., None]:
        """Return `function` with its exceptions kept instead of raised."""

        def guarded(*arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self.error = self.error or error

        return guarded

    def check(self) -> None:
        """Raise the kept exception, if any."""
        if self.error is not None:
            raise self.error


class Reported:
    """Memory sizes from TensorRT's log. Asking the engine for them would need a GPU."""

    def __init__(self) -> None:
        self.weights_bytes: int | None = None
        self.context_bytes: int | None = None
        """Memory of an execution context with the most demanding profile."""
        self._persistent_bytes = 0

    def read(self, message: str) -> None:
        """Read one line of the log. TensorRT logs a profile's persistent memory before its activation memory."""
        found = _MEMORY.search(message)
        if found is None:
            return
        what, size = found.group(1), int(found.group(2))
        if what == "Weights":
            self.weights_bytes = size
        elif what == "Device Persistent":
            self._persistent_bytes = size
        else:
            self.context_bytes = max(self.context_bytes or 0, size + self._persistent_bytes)


def _logger(trt: Any, log: Callable[[str], None]) -> Any:
    class StepLogger(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        """Copies TensorRT's messages to the step's log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.reported = Reported()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            if severity <= trt.ILogger.Severity.INFO:
                self.reported.read(message)
                log(f"[{severity.name}] {message}")

    return StepLogger()


def _last_errors(logger: Any) -> str:
    # Without a GPU every failure also reports the missing driver, which is not the cause.
    causes = [line for line in logger.errors if "CUDA driver version" not in line]
    return " | ".join(causes[-_MAX_ERRORS:]) or "it gave no reason"


def parse(parser: Any, request: EngineRequest) -> None:
    """Read the graph and bind its weights. Raises EngineBuildError."""
    if not parser.load_model_proto(request.model):
        raise EngineBuildError("TensorRT's parser cannot read the graph: " + _parser_errors(parser))
    for name, array in request.weights.items():
        if not array.flags["C_CONTIGUOUS"]:
            raise EngineBuildError(f"the weights of {name} are not contiguous")
        if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
            raise EngineBuildError(f"TensorRT's parser refuses the weights of {name}: " + _parser_errors(parser))
    if not parser.parse_model_proto():
        raise EngineBuildError("TensorRT's parser refuses the graph: " + _parser_errors(parser))


def _parser_errors(parser: Any) -> str:
    found = [parser.get_error(number) for number in range(parser.num_errors)]
    return " | ".join(f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in found[:_MAX_ERRORS])


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let TensorRT use several kernels where it has no fused kernel (e.g. for 3 query heads per key/value head)."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how the bindings downcast
            layer.attention.decomposable = True


def mark_refittable(network: Any, names: Iterable[str]) -> None:
    """Mark weights as refittable: with REFIT_INDIVIDUAL no others are. Raises EngineBuildError for weights that cannot be."""
    unknown = [name for name in names if not network.mark_weights_refittable(name)]
    if unknown:
        raise EngineBuildError(f"TensorRT cannot make {', '.join(unknown[:_MAX_ERRORS])} refittable", "Build without engine.refit.")


def _configure(trt: Any, config: Any, options: BuildConfig) -> None:
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, _VERBOSITY[options.profiling_verbosity])
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Else every engine would carry a copy of the lean runtime, which consumers install once.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for number, capability in enumerate(options.compute_capabilities):
            config.set_compute_capability(_compute_capability(trt, capability), number)


def _compute_capability(trt: Any, text: str) -> Any:
    name = "SM" + text.lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if name not in trt.ComputeCapability.__members__:
        known = ", ".join(member for member in trt.ComputeCapability.__members__ if member.startswith("SM"))
        raise SpecError(f"tensorrt_rtx cannot build for compute capability {text!r}", f"It builds for {known}.")
    return trt.ComputeCapability.__members__[name]


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile) -> None:
    added = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        name = network.get_input(number).name
        if name in profile.shapes:
            added.set_shape(name, *profile.shapes[name])
    if config.add_optimization_profile(added) < 0:
        raise EngineBuildError(f"TensorRT refuses the optimization profile {profile.name}")


def _monitor(trt: Any, guard: Guard, progress: Callable[[str, int, int], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        """Reports the outermost of TensorRT's nested phases. Cancels the build after an error."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.totals:
                progress(phase_name, step + 1, self.totals[phase_name])
            return guard.error is None

        def phase_finish(self, phase_name: str) -> None:
            total = self.totals.pop(phase_name, None)
            if total:
                progress(phase_name, total, total)

    return Monitor()


def _stream(trt: Any, guard: Guard, write: Callable[[memoryview], object]) -> Any:
    class Stream(trt.IStreamWriter):  # type: ignore[misc]  # the base is known at run time only
        """Passes the serialized engine on. An error ends the build instead of passing through C++."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.num_bytes = 0

        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            write(view)
            if guard.error is not None:
                return 0
            self.num_bytes += len(view)
            return len(view)

    return Stream()


def _record(trt: Any, network: Any, request: EngineRequest, reported: Reported) -> EngineRecord:
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    outputs = [network.get_output(number) for number in range(network.num_outputs)]
    aliases = _aliases(trt, network)
    tensors = [
        TensorRange(
            name=tensor.name,
            dtype=tensor.dtype.name.lower(),
            mode="input",
            shape=_shape(tensor),
            profiles={
                profile.name: dict(zip(("min", "opt", "max"), profile.shapes[tensor.name], strict=True))
                for profile in request.profiles
                if tensor.name in profile.shapes
            },
        )
        for tensor in inputs
    ]
    tensors += [
        TensorRange(
            name=tensor.name,
            dtype=tensor.dtype.name.lower(),
            mode="output",
            shape=_shape(tensor),
            aliases=aliases.get(tensor.name),
        )
        for tensor in outputs
    ]
    gpu = next(iter(visible_gpus()), None) if request.config.backend == "tensorrt" else None
    return EngineRecord(
        backend=request.config.backend,
        tensorrt_version=trt.__version__,
        cuda_version=cuda_version(request.config.backend),
        gpu_name=gpu.name if gpu else None,
        compute_capabilities=(gpu.compute_capability,) if gpu else request.config.compute_capabilities,
        profiles=tuple(profile.name for profile in request.profiles),
        tensors=tuple(tensors),
        weights_bytes=reported.weights_bytes,
        context_bytes=reported.context_bytes,
        **({"version_compatible": True} if request.config.version_compatible else {}),
    )


def _aliases(trt: Any, network: Any) -> dict[str, str]:
    """Return the output of each KV cache update, with the input whose memory it must share."""
    layers = (network.get_layer(number) for number in range(network.num_layers))
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    return {layer.get_output(0).name: layer.get_input(0).name for layer in updates}


def _shape(tensor: Any) -> tuple[int | str, ...]:
    names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
    return tuple(size if size >= 0 else name or "dynamic" for size, name in zip(tensor.shape, names, strict=True))
