"""A step under Nsight Systems: `nsys profile` starts its process on any cluster, and the trace goes to the store."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestrator.base.errors import ToolError
from orchestrator.events import STEP_EVENT, StepEvent, StepFailed, StepStarted, StepSucceeded
from orchestrator.planning.steps import Failure, FailureKind, Task
from orchestrator.scheduling import commits
from orchestrator.stores import open_store
from orchestrator.work.process import die_with_parent, scratch_root
from orchestrator.work.scratch import scratch_folder

_TRACE = "trace.nsys-rep"
_TAIL = 4000


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
        options = ["--force-overwrite=true", f"--output={trace}", *(task.profile or ())]
        command = [nsys, "profile", *options, sys.executable, "-m", "orchestrator.work", node]
        final: StepEvent | None = None
        with (
            (folder / "stderr").open("w+b") as errors,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, preexec_fn=die_with_parent
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            with process.stdin:
                process.stdin.write(task.model_copy(update={"profile": None}).model_dump_json().encode())
            for line in process.stdout:
                if not line.startswith(b"{"):  # nsys prints here too
                    continue
                event = STEP_EVENT.validate_json(line)
                if isinstance(event, (StepSucceeded, StepFailed)):
                    final = event
                else:
                    yield event
            code = process.wait()
            errors.seek(0)
            said = errors.read()[-_TAIL:].decode(errors="replace")
        yield _concluded(task, node, final, trace, f"nsys ended with exit code {code} before the step did", said)


def _concluded(task: Task, node: str, final: StepEvent | None, trace: Path, problem: str, said: str) -> StepEvent:
    if final is None:
        failure = Failure(kind=FailureKind.INFRASTRUCTURE, message=problem, node=node, log_tail=said)
        return StepFailed(digest=task.step.digest, failure=failure)
    if isinstance(final, StepSucceeded) and trace.exists():
        open_store(task.store, task.store_options).put(trace_key(task), trace.read_bytes())
        facts = final.outcome.facts.model_copy(update={"profile": trace_key(task)})
        return final.model_copy(update={"outcome": final.outcome.model_copy(update={"facts": facts})})
    return final
