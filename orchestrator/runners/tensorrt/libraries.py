"""What a rank needs from outside: TensorRT, NCCL and a GPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from orchestrator.base.extras import require
from orchestrator.engines import library
from orchestrator.runners.tensorrt.device import CudaDevice, Device


@dataclass(frozen=True, slots=True)
class Libraries:
    """The modules and the GPU of a rank."""

    trt: Any
    """Module `tensorrt` or `tensorrt_rtx`."""
    nccl: Any
    """Module `nccl.core` of nccl4py; None: the release has one rank."""
    device: Device


def open_libraries(backend: str, local_rank: int = 0, *, alone: bool = False) -> Libraries:
    """Import the modules of a backend and take the GPU `local_rank` of this machine. `alone`: the release has one rank.

    Raises ToolError when one is missing, EngineRunError when there is no such GPU.
    """
    require("gpu")
    device = CudaDevice(local_rank)
    return Libraries(library(backend), None if alone else importlib.import_module("nccl.core"), device)
