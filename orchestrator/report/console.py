"""For people at a terminal: a bar per kind of step while they run, one table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from orchestrator.clusters import AnyEvent
from orchestrator.core.nodes import NodeFacts
from orchestrator.core.plan import Plan
from orchestrator.core.schedule import Start
from orchestrator.core.step import FailureKind, Kind, Outcome
from orchestrator.report.listener import Finished
from orchestrator.report.tables import counted, format_bytes, step_table


class ConsoleListener:
    """A bar per kind of step while they run, one table at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[note]:<34}"), TimeElapsedColumn(),
            console=console, transient=not console.is_terminal,
        )  # fmt: skip
        self._bars: dict[Kind, TaskID] = {}
        self._plan: Plan | None = None
        self._done: dict[str, float] = {}
        self._bytes: dict[str, int] = {}
        self._began: dict[Kind, float] = {}

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None:
        self._plan = plan
        if already_published:
            self._console.print("This build is published already: 0 steps to run.")
            return
        for warning in plan.warnings:
            self._console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
        pending = plan.pending(committed)
        self._console.print(
            f"{len(plan.steps)} steps, {len(plan.steps) - len(pending)} committed or not needed, {len(pending)} to run."
        )
        for kind in Kind:
            count = sum(step.kind is kind for step in pending)
            if count:
                self._bars[kind] = self._progress.add_task(kind.value, total=count, note=f"0/{count}", start=False)
        if pending:
            self._progress.start()

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        devices = counted(device.name for node in nodes for device in node.devices)
        cpus = sum(node.cpus for node in nodes)
        what = [f"{cpus:.0f} CPU slots", *(f"{count} {name}" for name, count in devices.items())]
        self._progress.console.print(f"{len(nodes)} nodes: {', '.join(what)}", highlight=False)
        for warning in warnings:
            self._progress.console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)

    def on_event(self, event: AnyEvent) -> None:
        if self._plan is None:
            return
        kind = self._plan.step(event.digest).kind
        if kind not in self._bars:
            return
        bar = self._bars[kind]
        if event.type == "started":
            self._progress.start_task(bar)
            self._began.setdefault(kind, self._progress.get_time())
        elif event.type == "progress":
            self._done[event.digest] = min(event.done / max(event.total, 1), 0.99)
            if event.unit == "bytes":
                self._bytes[event.digest] = event.done
        elif event.type == "succeeded":
            self._done[event.digest] = 1.0
            for name in event.outcome.facts.get("not_finite", []):
                self._progress.console.print(f"[yellow]warning: {name} holds NaN or infinity[/]", highlight=False)
            if not self._console.is_terminal:  # a log file sees no bars
                self._console.print(f"{event.outcome.name}: {event.outcome.seconds:.1f} s on {event.outcome.node}")
        elif event.type == "failed":
            self._done.pop(event.digest, None)
            moved = event.failure.kind is FailureKind.HANDED_OVER
            word = "[yellow]moves[/]" if moved else "[red]failed[/]"
            self._progress.console.print(
                f"{self._plan.step(event.digest).name} {word}: {escape(event.failure.message)}", highlight=False
            )
        self._draw(kind, bar)

    def _draw(self, kind: Kind, bar: TaskID) -> None:
        assert self._plan is not None
        mine = {step.digest for step in self._plan.of_kind(kind)}
        fractions = [value for digest, value in self._done.items() if digest in mine]
        total = self._progress.tasks[self._progress.task_ids.index(bar)].total or 0
        note = f"{sum(value == 1.0 for value in fractions)}/{total:.0f}"
        moved = sum(value for digest, value in self._bytes.items() if digest in mine)
        if moved:
            elapsed = max(self._progress.get_time() - self._began.get(kind, 0.0), 1e-3)
            note += f"  {format_bytes(moved)}  {format_bytes(moved / elapsed)}/s"
        self._progress.update(bar, completed=sum(fractions), note=note)

    def on_retry(self, command: Start) -> None:
        self._progress.console.print(
            f"[yellow]{command.step.name}: attempt {command.attempt} in {command.delay_seconds:.0f} s[/]", highlight=False
        )

    def on_finish(self, plan: Plan, result: Finished) -> None:
        self._progress.stop()
        self._console.print(step_table(plan, result))
