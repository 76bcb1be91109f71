"""Base of all actors: a process on some node that runs steps one after the other and streams their events."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from actors.node_watch import node_name
from actors.postmortem import facts_here
from orchestrator.base.errors import BUG, ToolError
from orchestrator.events import StepFailed, StepSucceeded
from orchestrator.planning.steps import Kind, Task
from orchestrator.work.process import without_launcher
from orchestrator.work.streaming import stream
from orchestrator.work.usage import resident_bytes

Message = tuple[Literal["worker", "event", "rest"], str]
"""worker: WorkerFacts, sent first. event: a step's event as JSON. rest: bytes that the process still holds, sent last."""

KEPT_BYTES = 600 * 10**6
"""Largest memory of a process after its step; one with more is replaced, because libraries do not return everything."""


class StepActor:
    """Base of the actors. Wrapped for Ray where it is created, so that it stays an ordinary class."""

    kinds: ClassVar[tuple[Kind, ...]] = ()
    also: ClassVar[tuple[Kind, ...]] = ()
    """Further kinds that the actor runs while idle, instead of making room for another process."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is set before a step's libraries are loaded, which read it once.

        Not by the actor's runtime_env: Ray would start a process per environment, which is slower and bypasses its pool.
        """
        os.environ.update(environment or {})

    def run(self, task_json: str) -> Iterator[list[Message]]:
        """Run the task and yield its messages; the last event is final. The step's own errors are events, not exceptions."""
        task = Task.model_validate_json(task_json)
        if not self.runs(task.step.kind):
            raise ToolError(f"{type(self).__name__} does not run {task.step.kind.value} steps", BUG)
        forget_launcher()
        host, node_id = self.node()
        held: list[Message] = [("worker", facts_here(node_id).model_dump_json())]
        for event in stream(task, node_name(host, node_id)):
            held.append(("event", event.model_dump_json()))
            if isinstance(event, StepSucceeded | StepFailed):
                held.append(("rest", str(resting_bytes())))
            yield held
            held = []

    @classmethod
    def runs(cls, kind: Kind) -> bool:
        """Whether the actor may run steps of this kind."""
        return kind in cls.kinds or kind in cls.also

    @staticmethod
    def node() -> tuple[str, str]:
        """Return the host's name and Ray's node id."""
        import platform

        import ray

        return platform.node(), ray.get_runtime_context().get_node_id()


class ConvertActor(StepActor):
    """Actor that converts one layer group of the source for all tensor-parallel ranks of a stage. CPU only."""

    kinds = (Kind.CONVERT,)


class QuantizeActor(StepActor):
    """Actor that calibrates one pipeline stage, as the stage's rank 0."""

    kinds = (Kind.CALIBRATE,)


class EngineActor(StepActor):
    """Actor that compiles one rank. Backend `tensorrt` holds a GPU of the target type; `tensorrt_rtx` needs none.

    Between the engines of two stages it converts for the next.
    """

    kinds = (Kind.BUILD,)
    also = (Kind.CONVERT,)


class VerifyActor(StepActor):
    """Actor that executes all ranks of a pipeline stage, in lockstep or as the portable graph, the reference, or the miniature."""

    kinds = (Kind.VERIFY, Kind.REFERENCE, Kind.MINIATURE, Kind.EXPORT)


ACTORS = {kind: actor for actor in (ConvertActor, QuantizeActor, EngineActor, VerifyActor) for kind in actor.kinds}
"""Actor of each kind of step; Ray shows the names of these classes."""


def forget_launcher() -> None:
    """Remove the variables of MPI or Slurm that started the cluster here: a step is no rank of that job."""
    kept = without_launcher(os.environ)
    for name in [name for name in os.environ if name not in kept]:
        del os.environ[name]


def resting_bytes() -> int:
    """Return the bytes that this process holds after its step; if they are many, after returning what it can."""
    if resident_bytes(os.getpid()) > KEPT_BYTES:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes(os.getpid())
