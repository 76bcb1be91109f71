"""The worker process, `python -m orchestrator.work NODE`.

Reads a task as JSON from stdin, writes events as JSON lines to stdout.
"""

from __future__ import annotations

import sys

from orchestrator.planning.steps import Task
from orchestrator.work.child import event_pipe
from orchestrator.work.streaming import stream


def main() -> None:
    """Run the task of stdin."""
    with event_pipe() as pipe:
        task = Task.model_validate_json(sys.stdin.read())
        for event in stream(task, sys.argv[1]):
            pipe.write(event.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
