"""Engine backends: what compiles a rank's graph. The request, the record, and the table of backends."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.base.errors import ToolError
from orchestrator.base.extras import extra_error
from orchestrator.engines.record import EngineRecord
from orchestrator.spec.build import BuildConfig

if TYPE_CHECKING:
    import numpy.typing as npt

BACKENDS: dict[str, str] = {
    "tensorrt": "orchestrator.engines.tensorrt",
    "tensorrt_rtx": "orchestrator.engines.tensorrt",
}
"""Module that builds for each backend; both TensorRTs have one API."""

_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "build"}
"""The extra that brings each backend's library."""


@dataclass(frozen=True, slots=True)
class Profile:
    """An optimization profile: (min, opt, max) shape of every dynamic input."""

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Everything that an engine is compiled from."""

    model: bytes
    """Serialized ONNX model; its external initializers are bound from `weights`."""
    weights: Mapping[str, npt.NDArray[Any]]
    """Contiguous bytes of every external initializer, in the graph's dtype; not copied."""
    profiles: tuple[Profile, ...]
    config: BuildConfig


class EngineBackend(Protocol):
    """What a member of BACKENDS offers; proven by tests/contracts/engine_contract.py."""

    def build_engine(
        self,
        request: EngineRequest,
        write: Callable[[memoryview], object],
        progress: Callable[[str, int, int], None],
        log: Callable[[str], None],
    ) -> EngineRecord:
        """Compile and stream the plan to `write`, front to back.

        `progress` gets phase, steps done and steps in all. Raises EngineBuildError, ToolError, and whatever `write` raises.
        """
        ...


def backend(name: str) -> EngineBackend:
    """The backend module called `name`."""
    module: EngineBackend = importlib.import_module(BACKENDS[name])
    return module


def installed_packages(name: str) -> dict[str, str]:
    """Packages of a backend's library on this machine, without importing it: name to version; empty when there is none."""
    found = {}
    for distribution in _DISTRIBUTIONS[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return found


def installed_version(name: str) -> str | None:
    """Version of a backend's library on this machine, without importing it; None when it is not installed."""
    return next(iter(installed_packages(name).values()), None)


def cuda_version(name: str) -> str | None:
    """Major version of the CUDA that a backend's installed library was made for, by its package's name; None: it does not say."""
    versions = (package.rpartition("-cu")[2] for package in installed_packages(name) if "-cu" in package)
    return next(versions, None)


def require_version(name: str, expected: str | None) -> None:
    """Raises ToolError when the library is missing here, or is not the version that the plan was made for."""
    found = installed_version(name)
    if found is None:
        raise extra_error(_EXTRAS[name], f"{name} is not installed on this machine")
    if expected is not None and found != expected:
        raise ToolError(
            f"this machine has {name} {found}, the plan was made for {expected}",
            "Install the same version on the driver and on every node: engines are tied to it.",
        )
