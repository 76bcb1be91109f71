"""Progress of a pull or a verification: a bar with bytes, rate and time left on a terminal, else plain lines at intervals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from orchestrator.releases.manifest import FileRecord
from orchestrator.report.tables import format_bytes, format_count, format_seconds

LINE_SECONDS = 10.0
"""Seconds between two plain lines."""
_WINDOW_SECONDS = 30.0
"""Span of the rate: long enough to be steady, short enough to follow a link that slows down."""
_DIGITS = 16


class TransferView:
    """A `releases.transfers.Listener` and context manager. Leaves the terminal as it was."""

    def __init__(self, console: Console, *, names: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """`names`: print the name and digest of each finished file."""
        self._console, self._names, self._clock = console, names, clock
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"),
            console=console, transient=True, disable=not console.is_terminal,
            speed_estimate_period=_WINDOW_SECONDS, get_time=clock,
        )  # fmt: skip
        self._bar = self._progress.add_task("", total=1, note="")
        self._lock = threading.Lock()
        self._total = self._files = self._files_done = 0
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def on_begin(self, num_files: int, num_bytes: int) -> None:
        with self._lock:
            self._total, self._files = num_bytes, num_files
            self._last_line = self._clock()
            self._progress.update(self._bar, total=max(num_bytes, 1))
            self._progress.advance(self._bar, 0)  # the rate counts from here
            if not self._progress.disable:
                self._progress.start()

    def on_bytes(self, num_bytes: int) -> None:
        with self._lock:
            self._progress.advance(self._bar, num_bytes)
            if not self._progress.disable:
                self._progress.update(self._bar, description=self._counts(), note=self.note())
            elif self._clock() - self._last_line >= LINE_SECONDS and self._progress.tasks[0].completed < self._total:
                self._last_line = self._clock()
                self._print(f"{self._counts()}  {self.note()}")

    def on_file(self, file: FileRecord) -> None:
        with self._lock:
            self._files_done += 1
            if self._names:
                self._print(f"  {file.sha256[:_DIGITS]}  {escape(file.path)}")

    def on_note(self, text: str) -> None:
        with self._lock:
            self._print(escape(text))

    def note(self) -> str:
        """Return bytes, rate and time left as text."""
        task = self._progress.tasks[0]
        shown = f"{format_bytes(task.completed)} of {format_bytes(self._total)}"
        if not task.speed:
            return shown
        left = format_seconds(max(self._total - task.completed, 0) / task.speed)
        return f"{shown}  {format_bytes(task.speed)}/s  {left} left"

    def _counts(self) -> str:
        return f"{self._files_done} of {format_count(self._files, 'file')}"

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)
