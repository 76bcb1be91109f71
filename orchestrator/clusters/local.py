"""A cluster of processes of this machine, one per attempt: see processes.py."""

from __future__ import annotations

import contextlib
import platform
import queue
import time

from orchestrator.clusters.processes import StepProcesses
from orchestrator.events import StepEvent, StepFailed, StepSucceeded
from orchestrator.planning.steps import Resources, Task
from orchestrator.scheduling.cluster import machine_cpus, machine_memory_bytes
from orchestrator.scheduling.placement import Node, Placement
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.work.process import scratch_root
from orchestrator.work.scratch import remove_dead


class LocalCluster:
    """See Cluster."""

    def __init__(self, spec: ClusterSpec) -> None:
        everywhere = {name: pool.model_copy(update={"labels": {}, "fallback": ()}) for name, pool in spec.pools.items()}
        self._placement = Placement(spec.model_copy(update={"pools": everywhere}))
        self._placement.update([Node("", platform.node(), _capacity(spec))])
        self._scratch = spec.scratch
        self._events: queue.Queue[StepEvent] = queue.Queue()
        self.processes = StepProcesses(spec.threads_per_step, self._events.put)
        self._closed = False

    def start(self, task: Task) -> None:
        self._placement.add(task, self.now())

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        self._begin()
        found: list[StepEvent] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=timeout_seconds))
            while True:
                found.append(self._events.get_nowait())
        for event in found:
            if isinstance(event, (StepSucceeded, StepFailed)):
                self.processes.forget(event.digest)
                self._placement.end(event.digest, self.now(), event.failure if isinstance(event, StepFailed) else None)
        return found

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        self._closed = True
        self.processes.close()
        with contextlib.suppress(OSError):
            remove_dead(scratch_root(self._scratch))  # scratch that killed steps could not remove

    def _begin(self) -> None:
        if self._closed:
            return
        for placed in self._placement.begin(self.now()):
            self.processes.start(placed.task, placed.gpus, placed.node.name)


def _capacity(spec: ClusterSpec) -> Resources:
    """Return what this machine offers, its own cores or more where a pool names more, and the GPUs that the pools name."""
    pools = spec.pools.values()
    cpus = max(machine_cpus(), *(pool.cpus or 0 for pool in pools))
    return Resources(cpus=cpus, gpus=max(pool.gpus for pool in pools), memory_bytes=machine_memory_bytes())
