"""The worker process, `python -m orchestrator.work NODE`.

Reads a task as JSON from stdin, writes events as JSON lines to stdout. What libraries print goes to stderr.
"""

from __future__ import annotations

import os
import sys

from orchestrator.planning.steps import Task
from orchestrator.work.streaming import stream


def main() -> None:
    """Run the task of stdin."""
    # Libraries and native code may print to stdout: they get stderr, only events go into the pipe.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        task = Task.model_validate_json(sys.stdin.read())
        for event in stream(task, sys.argv[1]):
            pipe.write(event.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
