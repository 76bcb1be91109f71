"""NVIDIA GPUs of this machine, as NVML reports them, without a CUDA context. A machine without a driver has no GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    compute_capability: str
    """Compute capability, e.g. 9.0."""
    memory_bytes: int
    uuid: str = ""


@contextlib.contextmanager
def open_nvml() -> Iterator[Any]:
    """Open NVML, which comes with the driver, for the block; None without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def all_gpus() -> tuple[Gpu, ...]:
    """Return every GPU of the machine, in CUDA's order, without those that fail to answer."""
    found = []
    with open_nvml() as nvml:
        for number in range(nvml.nvmlDeviceGetCount()) if nvml is not None else ():
            with contextlib.suppress(nvml.NVMLError):
                found.append(_described(nvml, nvml.nvmlDeviceGetHandleByIndex(number)))
    return tuple(found)


def _described(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Gpu(str(nvml.nvmlDeviceGetName(handle)), f"{major}.{minor}", memory, str(nvml.nvmlDeviceGetUUID(handle)))


def visible_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA programs of this process see, in CUDA's order."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return all_gpus() if chosen is None else select(all_gpus(), chosen)


def select(gpus: tuple[Gpu, ...], chosen: str) -> tuple[Gpu, ...]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names by number or UUID, up to the first unknown one, as CUDA does."""
    kept = []
    for word in (part.strip() for part in chosen.split(",")):
        number = int(word) if word.isdigit() else next((i for i, gpu in enumerate(gpus) if word and gpu.uuid.startswith(word)), -1)
        if not 0 <= number < len(gpus):
            break
        kept.append(gpus[number])
    return tuple(kept)
