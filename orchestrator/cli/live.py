"""How a build that runs elsewhere looks on this terminal: bars per kind of step, told by its decoded events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestrator.core.progress import StepFailed, StepProgress, StepStarted, StepSucceeded
from orchestrator.core.step import Outcome
from orchestrator.following import BuildEvent, Finished, Planned, Retrying, Stepped
from orchestrator.report import format_bytes


class LiveView:
    """Takes events in order; `close` before anything else is printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[note]:<34}"), TimeElapsedColumn(),
            console=console, transient=not console.is_terminal,
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}
        self._done: dict[str, float] = {}
        """Part of each step that is done, by its name."""
        self._outcomes: list[Outcome] = []

    def on(self, event: BuildEvent) -> None:
        """Show one event."""
        if isinstance(event, Planned):
            self._planned(event)
        elif isinstance(event, Stepped):
            self._stepped(event)
        elif isinstance(event, Retrying):
            self._print(f"[yellow]{escape(event.step)}: attempt {event.attempt} in {event.delay_seconds:.0f} s[/]")
        elif isinstance(event, Finished):
            self.close()
            if self._outcomes:
                self._console.print(self._table())

    def close(self) -> None:
        """Leave the terminal as it is now."""
        self._progress.stop()

    def _planned(self, event: Planned) -> None:
        if event.already_published:
            self._print("This build is published already: 0 steps to run.")
            return
        for warning in event.warnings:
            self._print(f"[yellow]warning:[/] {escape(warning)}")
        kept = event.num_steps - len(event.pending)
        self._print(f"{event.num_steps} steps, {kept} committed or not needed, {len(event.pending)} to run.")
        for name in event.pending:
            self._totals[_kind(name)] = self._totals.get(_kind(name), 0) + 1
        for kind, total in self._totals.items():
            self._bars[kind] = self._progress.add_task(kind, total=total, note=f"0/{total}", start=False)
        if event.pending:
            self._progress.start()

    def _stepped(self, event: Stepped) -> None:
        handle: dict[type, Callable[[str, Any], None]] = {
            StepStarted: self._started, StepProgress: self._came_on, StepSucceeded: self._succeeded, StepFailed: self._failed,
        }  # fmt: skip
        handle[type(event.event)](event.step, event.event)
        kind = _kind(event.step)
        if kind not in self._bars:
            return
        parts = [part for name, part in self._done.items() if _kind(name) == kind]
        note = f"{sum(part == 1.0 for part in parts)}/{self._totals[kind]}"
        self._progress.update(self._bars[kind], completed=sum(parts), note=note)

    def _started(self, step: str, event: StepStarted) -> None:
        if _kind(step) in self._bars:
            self._progress.start_task(self._bars[_kind(step)])
        self._done[step] = 0.0

    def _came_on(self, step: str, event: StepProgress) -> None:
        self._done[step] = min(event.done / max(event.total, 1), 0.99)

    def _succeeded(self, step: str, event: StepSucceeded) -> None:
        self._done[step] = 1.0
        self._outcomes.append(event.outcome)
        if not self._console.is_terminal:  # a log file sees no bars
            self._print(f"{escape(step)}: {event.outcome.seconds:.1f} s on {event.outcome.node}")

    def _failed(self, step: str, event: StepFailed) -> None:
        self._done.pop(step, None)
        self._print(f"[red]{escape(step)} failed[/]: {escape(event.failure.message)}")

    def _table(self) -> Table:
        """Steps that ran, node by node."""
        table = Table("node", "steps", "seconds", "written", box=None, pad_edge=False)
        for node in sorted({outcome.node for outcome in self._outcomes}):
            mine = [outcome for outcome in self._outcomes if outcome.node == node]
            written = sum(output.num_bytes for outcome in mine for output in outcome.outputs)
            names = ", ".join(outcome.name for outcome in mine)
            table.add_row(node, names, f"{sum(outcome.seconds for outcome in mine):.1f}", format_bytes(written))
        return table

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)


def _kind(step: str) -> str:
    return step.partition("/")[0]
