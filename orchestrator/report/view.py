"""View of a build on a terminal: a bar per kind of step and the time left, from live or replayed events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from orchestrator.events import (
    Event,
    NodesProbed,
    Planned,
    StepEvent,
    StepFailed,
    StepProgressed,
    StepRetried,
    StepsFinished,
    StepStarted,
    StepSucceeded,
    kind_of,
)
from orchestrator.planning.facts import ConvertFacts
from orchestrator.planning.steps import FailureKind, Outcome
from orchestrator.report.remaining import Remaining
from orchestrator.report.tables import format_bytes, format_count, format_seconds, step_table


class LiveView:
    """A listener and context manager. Leaves the terminal as it is, and ends with a table of the steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._remaining = Remaining()
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[note]:<40}"), TimeElapsedColumn(),
            console=console, transient=not console.is_terminal,
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}
        self._done: dict[str, float] = {}
        """Finished part of each step, by name."""
        self._bytes: dict[str, int] = {}
        self._began: dict[str, float] = {}
        """Time of each kind's first start, on the events' clock."""
        self._left: TaskID | None = None
        self._outcomes: list[Outcome] = []

    def on(self, event: Event) -> None:
        """Show one event."""
        handlers: dict[type[Event], Callable[[Any], None]] = {
            Planned: self._planned, NodesProbed: self._nodes, StepStarted: self._started, StepProgressed: self._came_on,
            StepSucceeded: self._succeeded, StepFailed: self._failed, StepRetried: self._retried, StepsFinished: self._finished,
        }  # fmt: skip
        if type(event) in handlers:
            handlers[type(event)](event)
        if isinstance(event, StepEvent) and event.kind in self._bars:
            self._draw(event.kind, event.time)

    def close(self) -> None:
        """End the view and leave the terminal as it is."""
        if self._progress.live.is_started:
            self._progress.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _planned(self, event: Planned) -> None:
        if event.already_published:
            self._print("This build is published already: 0 steps to run.")
            return
        for warning in event.warnings:
            self._print(f"[yellow]warning:[/] {escape(warning)}")
        kept = event.steps - len(event.pending)
        self._print(f"{format_count(event.steps, 'step')}, {kept} committed or not needed, {len(event.pending)} to run.")
        for name in event.pending:
            self._totals[kind_of(name)] = self._totals.get(kind_of(name), 0) + 1
        for kind, total in self._totals.items():
            self._bars[kind] = self._progress.add_task(kind, total=total, note=f"0/{total}", start=False)
        self._remaining.plan(dict(zip(event.pending, event.estimates, strict=False)))
        if event.pending:
            self._left = self._progress.add_task("all", total=len(event.pending), note="", start=False)
            self._progress.start()

    def _nodes(self, event: NodesProbed) -> None:
        devices = Counter(device.name for node in event.nodes for device in node.devices)
        cpus = sum(node.cpus for node in event.nodes)
        what = [f"{cpus:.0f} CPU slots", *(f"{count} {name}" for name, count in devices.items())]
        self._print(f"{format_count(len(event.nodes), 'node')}: {escape(', '.join(what))}")
        for warning in event.warnings:
            self._print(f"[yellow]warning:[/] {escape(warning)}")

    def _draw(self, kind: str, at: float) -> None:
        parts = [part for name, part in self._done.items() if kind_of(name) == kind]
        note = f"{sum(part == 1.0 for part in parts)}/{self._totals[kind]}"
        moved = sum(count for name, count in self._bytes.items() if kind_of(name) == kind)
        if moved:
            elapsed = max(at - self._began.get(kind, at), 1e-3)
            note += f"  {format_bytes(moved)}  {format_bytes(moved / elapsed)}/s"
        self._progress.update(self._bars[kind], completed=sum(parts), note=note)
        if self._left is not None:
            seconds = self._remaining.seconds(at, self._done)
            left = "" if seconds is None else f"about {format_seconds(seconds)} left"
            self._progress.update(self._left, completed=sum(self._done.values()), note=left)

    def _started(self, event: StepStarted) -> None:
        if event.kind in self._bars:
            self._progress.start_task(self._bars[event.kind])
        if self._left is not None:
            self._progress.start_task(self._left)
        self._began.setdefault(event.kind, event.time)
        self._remaining.start(event.step, event.time)
        self._done[event.step] = 0.0

    def _came_on(self, event: StepProgressed) -> None:
        self._done[event.step] = min(event.done / max(event.total, 1), 0.99)
        if event.unit == "bytes":
            self._bytes[event.step] = event.done

    def _succeeded(self, event: StepSucceeded) -> None:
        self._done[event.step] = 1.0
        self._remaining.end(event.step, event.time)
        self._outcomes.append(event.outcome)
        facts = event.outcome.facts
        for name in facts.not_finite if isinstance(facts, ConvertFacts) else ():
            self._print(f"[yellow]warning: {escape(str(name))} holds NaN or infinity[/]")
        if not self._console.is_terminal:  # a log file shows no bars
            self._print(f"{escape(event.step)}: {event.outcome.seconds:.1f} s on {escape(event.outcome.node)}")

    def _failed(self, event: StepFailed) -> None:
        self._done.pop(event.step, None)
        self._remaining.drop(event.step)
        moved = event.failure.kind is FailureKind.HANDED_OVER
        word = "[yellow]moves[/]" if moved else "[red]failed[/]"
        self._print(f"{escape(event.step)} {word}: {escape(event.failure.message)}")

    def _retried(self, event: StepRetried) -> None:
        self._print(f"[yellow]{escape(event.step)}: attempt {event.attempt} in {event.delay_seconds:.0f} s[/]")

    def _finished(self, event: StepsFinished) -> None:
        self.close()
        rows = [(step.name, step.digest, outcome) for step, outcome in event.steps]
        if not rows:  # a build that runs elsewhere: its steps are not among its events
            rows = [(outcome.name, outcome.digest, outcome) for outcome in self._outcomes]
        if rows:
            self._console.print(step_table(rows, event.ran))

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, soft_wrap=True)
