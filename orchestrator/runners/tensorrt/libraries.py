"""Libraries and device of a rank: TensorRT, NCCL and a GPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from orchestrator.base.extras import require
from orchestrator.engines import LEAN, installed_version, library
from orchestrator.engines.record import EngineRecord
from orchestrator.runners.tensorrt.device import CudaDevice, Device


@dataclass(frozen=True, slots=True)
class Libraries:
    """The modules and the GPU of a rank."""

    trt: Any
    """Module `tensorrt` or `tensorrt_rtx`."""
    nccl: Any
    """Module `nccl.core` of nccl4py; None: the release has one rank."""
    device: Device


def open_libraries(engine: EngineRecord, local_rank: int = 0, *, alone: bool = False) -> Libraries:
    """Import the libraries that run an engine, and take the GPU `local_rank` of this machine. `alone`: the release has one rank.

    The lean runtime serves version-compatible engines where the whole library is missing. Raises ToolError when a library is
    missing, EngineRunError when there is no such GPU.
    """
    require("gpu")
    lean = engine.version_compatible and installed_version(engine.backend) is None and installed_version(LEAN) is not None
    trt = library(LEAN if lean else engine.backend)
    device = CudaDevice(local_rank)
    return Libraries(trt, None if alone else importlib.import_module("nccl.core"), device)
