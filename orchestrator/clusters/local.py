"""Processes of this machine: every attempt is a fresh `python -m orchestrator.work`.

The task goes in on stdin, events come out on a pipe as JSON lines. A process of its own gives each step its own memory and
lets a crash of native code be one step's failure. Children stay in our process group, so that they end with us.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

from orchestrator.clusters import AnyEvent, worker_environment
from orchestrator.clusters.admission import Admission
from orchestrator.core.progress import EVENT, StepFailed, StepSucceeded
from orchestrator.core.spec import ClusterSpec
from orchestrator.core.step import Failure, FailureKind, Task
from orchestrator.work.process import die_with_parent

_TAIL_BYTES = 4000


class LocalCluster:
    """See Cluster."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._admission = Admission(spec)
        self._events: queue.Queue[AnyEvent] = queue.Queue()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._followers: list[threading.Thread] = []
        self._closed = False

    def start(self, task: Task) -> None:
        self._admission.add(task)
        self._begin()

    def events(self, timeout_seconds: float | None) -> list[AnyEvent]:
        found: list[AnyEvent] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=timeout_seconds))
            while True:
                found.append(self._events.get_nowait())
        for event in found:
            if isinstance(event, (StepSucceeded, StepFailed)):
                self._processes.pop(event.digest, None)
                self._admission.end(event.digest)
        self._begin()
        return found

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        self._closed = True
        self._admission.clear()
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        for follower in self._followers:
            follower.join()
        self._processes.clear()

    def _begin(self) -> None:
        if self._closed:
            return
        for task in self._admission.begin():
            process, log = self._spawn(task)
            self._processes[task.step.digest] = process
            follower = threading.Thread(target=self._follow, args=(task, process, log), daemon=True)
            follower.start()
            self._followers.append(follower)

    def _spawn(self, task: Task) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        gpu = task.step.resources.gpus > 0
        environment = {**os.environ, **worker_environment(self._spec.threads_per_step, gpu=gpu)}
        log = tempfile.TemporaryFile()  # noqa: SIM115  # _follow closes it when the process has ended
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            preexec_fn=die_with_parent,
        )
        return process, log

    def _follow(self, task: Task, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        final = False
        with log, process.stdout:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(task.model_dump_json().encode())
            for line in process.stdout:
                event = EVENT.validate_json(line)
                final = final or isinstance(event, (StepSucceeded, StepFailed))
                self._events.put(event)
            code = process.wait()
            if not final and not self._closed:
                self._events.put(StepFailed(digest=task.step.digest, failure=_crash(code, log)))


def _crash(code: int, log: IO[bytes]) -> Failure:
    """A process that ended without a final event: killed, or crashed in native code."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(size - _TAIL_BYTES, 0))
    tail = log.read().decode(errors="replace")
    reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return Failure(kind=FailureKind.INFRASTRUCTURE, message=f"the step's process {reason}", node=platform.node(), log_tail=tail)
