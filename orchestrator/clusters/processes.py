"""Steps as processes of this machine: every attempt is a new `python -m orchestrator.work`.

The task goes in on stdin, events come out on a pipe as JSON lines. Each step has its own memory, and a crash of native code fails
only that step. Children stay in our process group, so that they end with us.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO

from orchestrator.events import STEP_EVENT, StepEvent, StepFailed, StepSucceeded
from orchestrator.planning.steps import Task
from orchestrator.scheduling.cluster import worker_environment
from orchestrator.work.lost import crash, oom_kills
from orchestrator.work.process import belong_to_parent, without_launcher


class StepProcesses:
    """Running steps of one machine. `report` is called from background threads."""

    def __init__(self, threads_per_step: int, report: Callable[[StepEvent], None]) -> None:
        self._threads_per_step = threads_per_step
        self._report = report
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._followers: list[threading.Thread] = []
        self._closed = False

    def start(self, task: Task, gpus: tuple[int, ...], node: str) -> None:
        """Start an attempt. `gpus`: indices among the devices visible to this process; `node`: name of the machine."""
        process, log = self._spawn(node, gpus)
        self._processes[task.step.digest] = process
        follower = threading.Thread(target=self._follow, args=(task, node, process, log), daemon=True)
        follower.start()
        self._followers = [thread for thread in self._followers if thread.is_alive()] + [follower]

    def forget(self, digest: str) -> None:
        """Forget a step whose final event was seen."""
        self._processes.pop(digest, None)

    def pid(self, digest: str) -> int:
        """Return the process id of a running step. Raises KeyError."""
        return self._processes[digest].pid

    def close(self) -> None:
        """End every step; nothing is reported afterwards. Idempotent."""
        self._closed = True
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        for follower in self._followers:
            follower.join()
        self._processes.clear()

    def _spawn(self, node: str, gpus: tuple[int, ...]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        environment = {**without_launcher(os.environ), **worker_environment(self._threads_per_step, gpu=bool(gpus))}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = devices(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        log = tempfile.TemporaryFile()  # noqa: SIM115  # _follow closes it when the process has ended
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.work", node],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            preexec_fn=belong_to_parent,
        )
        return process, log

    def _follow(self, task: Task, node: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        final, kills = False, oom_kills()
        with log, process.stdout:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(task.model_dump_json().encode())
            for line in process.stdout:
                try:
                    event = STEP_EVENT.validate_json(line)
                except ValueError:  # no event: output of a library, or of another version of this program
                    continue
                final = final or isinstance(event, (StepSucceeded, StepFailed))
                self._report(event)
            code = process.wait()
            if not final and not self._closed:
                self._report(StepFailed(digest=task.step.digest, failure=crash(code, node, log, oom_kills() - kills)))


def devices(gpus: tuple[int, ...], visible: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES for a step: the devices `gpus` of those visible to us."""
    names = visible.split(",") if visible else []
    return ",".join(names[number].strip() if number < len(names) else str(number) for number in gpus)
