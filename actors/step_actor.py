"""What every actor is: a process on some node that runs one step and streams its events."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import ClassVar

from orchestrator.core.errors import ToolError
from orchestrator.core.step import Kind, Task
from orchestrator.work.streaming import stream

_LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_")
"""A cluster started under MPI or Slurm must not make a step believe that it is a rank of that job."""


class StepActor:
    """Base of the actors; wrapped for Ray where it is created, so that it stays an ordinary class."""

    kinds: ClassVar[tuple[Kind, ...]] = ()

    def run(self, task_json: str) -> Iterator[str]:
        """Run the task; yields events as JSON, the last one final. The step's own errors are events, not exceptions."""
        task = Task.model_validate_json(task_json)
        if task.step.kind not in self.kinds:
            raise ToolError(f"{type(self).__name__} does not run {task.step.kind.value} steps")
        for name in [name for name in os.environ if name.startswith(_LAUNCHER_PREFIXES)]:
            del os.environ[name]
        for event in stream(task, self.node()):
            yield event.model_dump_json()

    @staticmethod
    def node() -> str:
        """The host's name and the start of Ray's node id, which tells apart nodes of one host."""
        import ray

        return f"{platform.node()}/{ray.get_runtime_context().get_node_id()[:6]}"
