"""Resource usage of a running step: memory and CPU from psutil, GPUs from NVML if there are any."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from dataclasses import dataclass
from typing import Any, Self

import psutil

from orchestrator.engines.device import open_nvml, visible_gpus
from orchestrator.planning.steps import Usage

_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Resources in use at one moment."""

    memory_bytes: int
    gpu_utilizations: tuple[float, ...] = ()
    """Utilization by device, 0 to 1."""
    gpu_memory_bytes: tuple[int, ...] = ()


class Sampler:
    """Takes samples in a thread while the block runs. Never fails the step."""

    def __init__(self, reader: MachineReader | None = None, seconds: float = _SECONDS) -> None:
        self._reader = reader or MachineReader()
        self._seconds = seconds
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="usage", daemon=True)
        self._cpu = 0.0
        self._host: tuple[float, float] = (0.0, 0.0)

    def __enter__(self) -> Self:
        self._cpu, self._host = self._reader.cpu_seconds(), self._reader.host_seconds()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join(_SECONDS)
        self._take()
        self._cpu = self._reader.cpu_seconds() - self._cpu
        busy, every = self._reader.host_seconds()
        self._host = (busy - self._host[0], every - self._host[1])

    def usage(self) -> Usage:
        """Return the usage during the block, once it has ended."""
        samples, (busy, every) = list(self._samples), self._host
        utilizations = [share for sample in samples for share in sample.gpu_utilizations]
        return Usage(
            peak_memory_bytes=max((sample.memory_bytes for sample in samples), default=0),
            cpu_seconds=round(self._cpu, 3),
            host_cpu=round(busy / every, 4) if every else None,
            gpu_utilization=round(sum(utilizations) / len(utilizations), 4) if utilizations else None,
            peak_gpu_memory_bytes=max((count for sample in samples for count in sample.gpu_memory_bytes), default=None),
            num_samples=len(samples),
        )

    def _work(self) -> None:
        self._take()
        while not self._stop.wait(self._seconds):
            self._take()

    def _take(self) -> None:
        with contextlib.suppress(Exception):  # a missing sample harms nobody
            self._samples.append(self._reader.sample())


class MachineReader:
    """Samples of this process and its children, and of the GPUs that it sees."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()  # NVML stays open as long as the reader
        self._nvml = self._stack.enter_context(open_nvml())
        self._devices: list[Any] = []
        with contextlib.suppress(Exception):  # a GPU that fails is not sampled
            self._devices = [self._nvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in visible_gpus()]

    def sample(self) -> Sample:
        utilizations, memory = [], []
        for device in self._devices:
            utilizations.append(self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100)
            memory.append(int(self._nvml.nvmlDeviceGetMemoryInfo(device).used))
        processes = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
        return Sample(sum(map(resident_bytes, processes)), tuple(utilizations), tuple(memory))

    def cpu_seconds(self) -> float:
        """Return the CPU seconds spent so far by this process and its ended children."""
        spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in spent)

    def host_seconds(self) -> tuple[float, float]:
        """Return the busy and total seconds of all cores since boot."""
        times = psutil.cpu_times()
        every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # counted in user and nice too
        return every - times.idle - getattr(times, "iowait", 0.0), every


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process; 0 when it has ended."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
