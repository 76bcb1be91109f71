"""A step under Nsight Systems: `nsys profile` starts its process on any cluster, and the trace goes to the store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from orchestrator.base.errors import ToolError
from orchestrator.events import StepEvent, StepFailed, StepStarted, StepSucceeded
from orchestrator.planning.steps import Failure, Task
from orchestrator.scheduling import commits
from orchestrator.stores import open_store
from orchestrator.work.child import Child
from orchestrator.work.process import scratch_root
from orchestrator.work.scratch import scratch_folder

_TRACE = "trace.nsys-rep"


def trace_key(task: Task) -> str:
    """Return the store key of a step's trace; `collect` removes traces that no release needs."""
    return commits.attempt_prefix(task.step.digest, f"{task.build_id}profile{task.attempt}") + _TRACE


def stream_profiled(task: Task, node: str) -> Iterator[StepEvent]:
    """Stream events as `stream` does. The facts of the last event name the trace; the committed facts do not."""
    nsys = shutil.which("nsys")
    if nsys is None:
        yield StepStarted(digest=task.step.digest, node=node, attempt=task.attempt)
        error = ToolError(f"no nsys on {node}", "Install Nsight Systems there, or remove `profile` from the cluster file.")
        yield StepFailed(digest=task.step.digest, failure=Failure.of(error, node))
        return
    with scratch_folder(scratch_root(task.scratch), task.build_id) as folder:
        trace = folder / _TRACE
        through = [nsys, "profile", "--force-overwrite=true", f"--output={trace}", *(task.profile or ())]
        final: StepEvent | None = None
        with Child("orchestrator.work", node, through=through) as child:
            for event in child.events(task.model_copy(update={"profile": None})):
                if isinstance(event, (StepSucceeded, StepFailed)):
                    final = event
                else:
                    yield event
            yield _with_trace(task, final or StepFailed(digest=task.step.digest, failure=child.failure(node)), trace)


def _with_trace(task: Task, final: StepEvent, trace: Path) -> StepEvent:
    if isinstance(final, StepSucceeded) and trace.exists():
        open_store(task.store, task.store_options).put(trace_key(task), trace.read_bytes())
        facts = final.outcome.facts.model_copy(update={"profile": trace_key(task)})
        return final.model_copy(update={"outcome": final.outcome.model_copy(update={"facts": facts})})
    return final
