"""A cluster of processes of this machine, one per attempt: see processes.py."""

from __future__ import annotations

import contextlib
import queue
import time

from orchestrator.clusters.processes import StepProcesses
from orchestrator.events import StepEvent, StepFailed, StepSucceeded
from orchestrator.planning.steps import Task
from orchestrator.run.admission import Admission
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.work.process import scratch_root
from orchestrator.work.scratch import remove_dead


class LocalCluster:
    """See Cluster."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._admission = Admission(spec)
        self._scratch = spec.scratch
        self._events: queue.Queue[StepEvent] = queue.Queue()
        self.processes = StepProcesses(spec.threads_per_step, self._events.put)
        self._closed = False

    def start(self, task: Task) -> None:
        self._admission.add(task)

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
                self._admission.end(event.digest)
        return found

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        self._closed = True
        self._admission.clear()
        self.processes.close()
        with contextlib.suppress(OSError):
            remove_dead(scratch_root(self._scratch))  # scratch that killed steps could not remove

    def _begin(self) -> None:
        if self._closed:
            return
        for placed in self._admission.begin():
            self.processes.start(placed.task, placed.gpus)
