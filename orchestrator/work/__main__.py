"""The worker process: a task as JSON on stdin, events as JSON lines on stdout, everything that libraries print on stderr."""

from __future__ import annotations

import os
import platform
import sys
import threading

from orchestrator.core.progress import StepFailed, StepProgress, StepSucceeded
from orchestrator.core.step import Failure, Task
from orchestrator.work import log_of, run


def main() -> None:
    # Libraries and native code may print: only we write to the pipe.
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    task = Task.model_validate_json(sys.stdin.read())
    lock = threading.Lock()

    def emit(event: StepProgress | StepSucceeded | StepFailed) -> None:
        with lock:
            pipe.write(event.model_dump_json() + "\n")
            pipe.flush()

    node = platform.node()
    try:
        outcome = run(task, emit, node)
    except Exception as error:  # every failure must reach the driver as an event
        import traceback

        traceback.print_exc()
        emit(StepFailed(digest=task.step.digest, failure=Failure.of(error, node, log_of(error))))
    else:
        emit(StepSucceeded(digest=task.step.digest, outcome=outcome))


if __name__ == "__main__":
    main()
