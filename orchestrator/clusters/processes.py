"""Steps as processes of this machine: every attempt is a new `python -m orchestrator.work`.

Each step has its own memory, and a crash of native code fails only that step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from orchestrator.events import StepEvent, StepFailed, StepSucceeded
from orchestrator.planning.steps import Task
from orchestrator.scheduling.cluster import worker_environment
from orchestrator.work.child import Child
from orchestrator.work.process import without_launcher


class StepProcesses:
    """Running steps of one machine. `report` is called from background threads."""

    def __init__(self, threads_per_step: int, report: Callable[[StepEvent], None]) -> None:
        self._threads_per_step = threads_per_step
        self._report = report
        self._children: dict[str, Child] = {}
        self._followers: list[threading.Thread] = []
        self._closed = False

    def start(self, task: Task, gpus: tuple[int, ...], node: str) -> None:
        """Start an attempt. `gpus`: indices among the devices visible to this process; `node`: name of the machine."""
        environment = {**without_launcher(os.environ), **worker_environment(self._threads_per_step, gpu=bool(gpus))}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = devices(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._children[task.step.digest] = child = Child("orchestrator.work", node, environment=environment)
        follower = threading.Thread(target=self._follow, args=(task, node, child), daemon=True)
        follower.start()
        self._followers = [thread for thread in self._followers if thread.is_alive()] + [follower]

    def forget(self, digest: str) -> None:
        """Forget a step whose final event was seen."""
        self._children.pop(digest, None)

    def pid(self, digest: str) -> int:
        """Return the process id of a running step. Raises KeyError."""
        return self._children[digest].pid

    def close(self) -> None:
        """End every step; nothing is reported afterwards. Idempotent."""
        self._closed = True
        for child in self._children.values():
            child.kill()
        for follower in self._followers:
            follower.join()
        self._children.clear()

    def _follow(self, task: Task, node: str, child: Child) -> None:
        final = False
        with child:
            for event in child.events(task):
                final = final or isinstance(event, (StepSucceeded, StepFailed))
                self._report(event)
            if not final and not self._closed:
                self._report(StepFailed(digest=task.step.digest, failure=child.failure(node)))


def devices(gpus: tuple[int, ...], visible: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES for a step: the devices `gpus` of those visible to us."""
    names = visible.split(",") if visible else []
    return ",".join(names[number].strip() if number < len(names) else str(number) for number in gpus)
