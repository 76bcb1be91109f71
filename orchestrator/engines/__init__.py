"""Engine backends, which compile the graph of a rank. The request and the table of backends."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
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
"""Backend -> module. Both TensorRT libraries have the same API."""

_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "tensorrt_lean": ("tensorrt-lean-cu13", "tensorrt-lean-cu12"),
}
LEAN = "tensorrt_lean"
"""The runtime without a builder, which loads version-compatible engines of backend tensorrt."""
COLLECTIVES_ADVICE = "Install tensorrt-cu13>=11.2, the same on the driver and on every node; or build with tp=1."
_WITH_COLLECTIVES = (11, 2)
"""First version of TensorRT that keeps the collectives of an engine with Attention (pytorch/TensorRT#4381)."""
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "build"}
"""Backend -> extra that installs its library."""


@dataclass(frozen=True, slots=True)
class Profile:
    """An optimization profile: the (min, opt, max) shapes of every dynamic input."""

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Inputs of the compilation of an engine."""

    model: bytes
    """Serialized ONNX model. Its external initializers are bound from `weights`."""
    weights: Mapping[str, npt.NDArray[Any]]
    """Contiguous array of every external initializer, in the graph's dtype. Arrays are not copied."""
    profiles: tuple[Profile, ...]
    config: BuildConfig
    release: Callable[[], object] = lambda: None
    """Takes pages of mapped `weights` out of this process's memory; those touched again are read again."""


class EngineBackend(Protocol):
    """Interface of a module of BACKENDS, tested by tests/contracts/engine_contract.py."""

    def build_engine(
        self,
        request: EngineRequest,
        write: Callable[[memoryview], object],
        progress: Callable[[str, int, int], None],
        log: Callable[[str], None],
    ) -> EngineRecord:
        """Compile, and stream the serialized engine to `write`, front to back.

        `progress` gets phase, steps done, total steps. Raises EngineBuildError, ToolError, and what `write` raises.
        """
        ...


def backend(name: str) -> EngineBackend:
    """Return the module of the backend `name`."""
    module: EngineBackend = importlib.import_module(BACKENDS[name])
    return module


def installed_packages(name: str) -> dict[str, str]:
    """Return the packages of a backend's library on this machine, without importing it: name -> version; empty: not installed."""
    found = {}
    for distribution in _DISTRIBUTIONS[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return found


def installed_version(name: str) -> str | None:
    """Return the version of a backend's library on this machine, without importing it; None: not installed."""
    return next(iter(installed_packages(name).values()), None)


def cuda_version(name: str) -> str | None:
    """Return the major version of the CUDA that the installed library was built for; None: its package name has none."""
    versions = (package.rpartition("-cu")[2] for package in installed_packages(name) if "-cu" in package)
    return next(versions, None)


def library(name: str) -> Any:
    """Import and return the library of a backend. Raises ToolError when it is not installed."""
    require_version(name, None)
    return importlib.import_module(name)


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparing: 11.4.0.106 -> (11, 4, 0, 106)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def collectives_problem(name: str, version: str | None, tp: int) -> str:
    """Return why this version of a backend's library must not build ranks of `tp`; empty: it may, or the version is not known."""
    if name != "tensorrt" or tp == 1 or version is None or version_numbers(version) >= _WITH_COLLECTIVES:
        return ""
    return f"tensorrt {version} can drop the collectives of tp={tp} without an error"


def require_collectives(name: str, version: str | None, tp: int) -> None:
    """Check that a backend's library builds collectives right. Raises ToolError."""
    problem = collectives_problem(name, version, tp)
    if problem:
        raise ToolError(problem, COLLECTIVES_ADVICE)


def require_version(name: str, expected: str | None) -> None:
    """Check the version of a backend's library. Raises ToolError if it is missing or differs from the plan's, `expected`."""
    found = installed_version(name)
    if found is None:
        raise extra_error(_EXTRAS[name], f"{name} is not installed on this machine")
    if expected is not None and found != expected:
        raise ToolError(
            f"this machine has {name} {found}, the plan was made for {expected}",
            "Install the same version on the driver and on every node: engines are tied to it.",
        )
