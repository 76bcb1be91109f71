"""NVIDIA GPUs of this machine, as NVML or nvidia-smi reports them, without a CUDA context.

A machine without a driver has no GPUs. Device numbers are CUDA's: CUDA_VISIBLE_DEVICES is respected.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass

_NAME_BYTES = 96
_SMI_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    compute_capability: str
    """Compute capability, e.g. 9.0."""
    memory_bytes: int
    uuid: str = ""


def visible_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA programs of this process see, in CUDA's order."""
    found = _from_library() or _from_program()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if chosen is None else select(found, chosen)


def select(gpus: tuple[Gpu, ...], chosen: str) -> tuple[Gpu, ...]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names by number or UUID, up to the first unknown one, as CUDA does."""
    kept = []
    for word in (part.strip() for part in chosen.split(",")):
        number = int(word) if word.isdigit() else next((i for i, gpu in enumerate(gpus) if word and gpu.uuid.startswith(word)), -1)
        if not 0 <= number < len(gpus):
            break
        kept.append(gpus[number])
    return tuple(kept)


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _from_library() -> tuple[Gpu, ...]:
    """Return the GPUs from NVML, which comes with the driver; empty: NVML is missing or fails."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2():
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        found = [_described(nvml, number) for number in range(count.value)]
        return tuple(gpu for gpu in found if gpu is not None)
    finally:
        nvml.nvmlShutdown()


def _described(nvml: ctypes.CDLL, number: int) -> Gpu | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name, uuid = (ctypes.create_string_buffer(_NAME_BYTES) for _ in range(2))
    failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle))
        or nvml.nvmlDeviceGetName(handle, name, _NAME_BYTES)
        or nvml.nvmlDeviceGetUUID(handle, uuid, _NAME_BYTES)
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    if failed:
        return None
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", memory.total, uuid.value.decode())


def _from_program() -> tuple[Gpu, ...]:
    """Return the GPUs from nvidia-smi, for containers that have the program but not the library."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name,compute_cap,memory.total,uuid", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_smi(done.stdout)


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """Parse nvidia-smi's CSV of name, compute_cap, memory.total (MiB) and uuid. Other lines are skipped."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[2].isdigit():
            found.append(Gpu(cells[0], cells[1], int(cells[2]) * 2**20, cells[3]))
    return tuple(found)
