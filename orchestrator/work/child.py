"""A child process of Python that is given a task on stdin and tells events on stdout, as JSON lines.

A crash of native code ends only the child. It stays in our process group, so that it ends with us.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Self

from pydantic import BaseModel

from orchestrator.events import STEP_EVENT, StepEvent
from orchestrator.planning.steps import Failure
from orchestrator.work.lost import crash, oom_kills
from orchestrator.work.process import belong_to_parent


class Child:
    """A running child. Leaving the block kills it."""

    def __init__(self, *words: str, through: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """Start `python -m` with `words`. `through`: a program that starts the command after its own words."""
        self._log, self._kills = tempfile.TemporaryFile(), oom_kills()  # noqa: SIM115  # closed with the block
        self._process = subprocess.Popen(
            [*through, sys.executable, "-m", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            preexec_fn=belong_to_parent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with self._log, self._process:
            self._process.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def events(self, task: BaseModel) -> Iterator[StepEvent]:
        """Hand over the task; yields the child's events until it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin:  # a child that ends at once: its exit code says more
            self._process.stdin.write(task.model_dump_json().encode())
        for line in self._process.stdout:
            try:
                event = STEP_EVENT.validate_json(line)
            except ValueError:  # no event: output of a library, or of another version of this program
                continue
            yield event
        self._process.wait()

    def failure(self, node: str) -> Failure:
        """Say what became of a child that has ended without a final event."""
        return crash(self._process.returncode, node, self._log, oom_kills() - self._kills)


@contextlib.contextmanager
def event_pipe() -> Iterator[IO[str]]:
    """Give the child its pipe for events. What libraries and native code print to stdout goes to stderr from here on."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        yield pipe
