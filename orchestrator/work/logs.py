"""A step's log: its own messages and libraries' warnings, as text or as JSON lines with step, rank, attempt and node."""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable
from typing import Any, Self

from orchestrator.events import stage_of
from orchestrator.planning.steps import Task


class StepLog(logging.Handler):
    """Collects log lines. As a context manager, also the warnings of all library loggers in this process."""

    def __init__(self, task: Task, node: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__(logging.WARNING)
        self._where = {
            "step": task.step.name, "kind": task.step.kind.value, "rank": task.step.rank,
            "stage": stage_of(task.step.name), "attempt": task.attempt, "node": node,
        }  # fmt: skip
        self._as_json = task.log_format == "json"
        self._clock = clock
        self.lines: list[str] = []

    def write(self, message: str) -> None:
        """Append a message of the step itself."""
        self._add("info", message)

    def emit(self, record: logging.LogRecord) -> None:
        self._add(record.levelname.lower(), record.getMessage(), logger=record.name)

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *raised: object) -> None:
        logging.getLogger().removeHandler(self)

    def _add(self, level: str, message: str, **more: Any) -> None:
        if self._as_json:
            at = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).isoformat(timespec="milliseconds")
            message = json.dumps({"time": at, "level": level, **self._where, **more, "message": message})
        self.lines.append(message)
