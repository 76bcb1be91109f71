"""What every actor is: a process on some node that runs steps, one after the other, and streams their events."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from actors.node_watch import node_name
from actors.postmortem import facts_here
from orchestrator.base.errors import BUG, ToolError
from orchestrator.planning.steps import Kind, Task
from orchestrator.work.process import without_launcher
from orchestrator.work.streaming import stream
from orchestrator.work.usage import resident_bytes

Message = tuple[Literal["worker", "event", "rest"], str]
"""worker: WorkerFacts, first of all. event: a step's event, as JSON. rest: bytes that the process still holds, last of all."""

KEPT_BYTES = 600 * 10**6
"""A process that holds more than this after its step is replaced: libraries do not return everything."""


class StepActor:
    """Base of the actors; wrapped for Ray where it is created, so that it stays an ordinary class."""

    kinds: ClassVar[tuple[Kind, ...]] = ()
    also: ClassVar[tuple[Kind, ...]] = ()
    """What it runs too while it has nothing of its own to do, rather than make room for another process."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is set before a step's libraries are loaded, which read it once.

        Not in the actor's runtime_env: Ray would start a process for every other environment, more slowly, and its pool of
        started ones would be of no use.
        """
        os.environ.update(environment or {})

    def run(self, task_json: str) -> Iterator[list[Message]]:
        """Run the task; its last event is final. The step's own errors are events, not exceptions."""
        task = Task.model_validate_json(task_json)
        if not self.runs(task.step.kind):
            raise ToolError(f"{type(self).__name__} does not run {task.step.kind.value} steps", BUG)
        forget_launcher()
        host, node_id = self.node()
        held: list[Message] = [("worker", facts_here(node_id).model_dump_json())]
        for event in stream(task, node_name(host, node_id)):
            held.append(("event", event.model_dump_json()))
            if event.type in ("succeeded", "failed"):
                held.append(("rest", str(resting_bytes())))
            yield held
            held = []

    @classmethod
    def runs(cls, kind: Kind) -> bool:
        """Whether it may be given such a step."""
        return kind in cls.kinds or kind in cls.also

    @staticmethod
    def node() -> tuple[str, str]:
        """The host's name and Ray's node id."""
        import platform

        import ray

        return platform.node(), ray.get_runtime_context().get_node_id()


def forget_launcher() -> None:
    """Drop what MPI or Slurm told the process that started the cluster here: a step is no rank of that job."""
    kept = without_launcher(os.environ)
    for name in [name for name in os.environ if name not in kept]:
        del os.environ[name]


def resting_bytes() -> int:
    """Memory that this process holds after its step, once it has given back what it can if that is much."""
    if resident_bytes(os.getpid()) > KEPT_BYTES:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes(os.getpid())
