"""What a build says while it runs and when it ends: listeners for people and for machines."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestrator.clusters import AnyEvent
from orchestrator.core.nodes import NodeFacts
from orchestrator.core.plan import Plan
from orchestrator.core.schedule import Start
from orchestrator.core.step import FailureKind, Kind, Outcome

if TYPE_CHECKING:
    from orchestrator.sweep import SweepRow


class Finished(Protocol):
    """What a listener reads of a driver's Result."""

    @property
    def outcomes(self) -> Mapping[str, Outcome]: ...

    @property
    def ran(self) -> frozenset[str]: ...


class Listener(Protocol):
    """Told of everything that happens, in order."""

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None: ...

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        """What the nodes have, before the first step; a cluster that is this machine alone says nothing."""
        ...

    def on_event(self, event: AnyEvent) -> None: ...

    def on_retry(self, command: Start) -> None: ...

    def on_finish(self, plan: Plan, result: Finished) -> None: ...


class SilentListener:
    """Says nothing."""

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None:
        pass

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        pass

    def on_event(self, event: AnyEvent) -> None:
        pass

    def on_retry(self, command: Start) -> None:
        pass

    def on_finish(self, plan: Plan, result: Finished) -> None:
        pass


def format_bytes(count: float) -> str:
    """1.5 GB, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


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


def step_table(plan: Plan, result: Finished) -> Table:
    """Step, node, seconds, bytes written, digest, and whether it was run, cached, or not needed."""
    table = Table("step", "node", "seconds", "written", "digest", "", box=None, pad_edge=False)
    for step in plan.steps:
        outcome = result.outcomes.get(step.digest)
        if outcome is None:
            table.add_row(step.name, "", "", "", step.digest[:12], "not run")
            continue
        written = format_bytes(sum(output.num_bytes for output in outcome.outputs))
        state = "run" if step.digest in result.ran else "cached"
        table.add_row(step.name, outcome.node, f"{outcome.seconds:.1f}", written, step.digest[:12], state)
    return table


class JsonListener:
    """One JSON object per line, for machines."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._plan: Plan | None = None

    def _say(self, what: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": what, **fields}) + "\n")
        self._stream.flush()

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None:
        self._plan = plan
        pending = [] if already_published else [step.name for step in plan.pending(committed)]
        self._say(
            "plan", steps=len(plan.steps), pending=pending, build_key=plan.build_key, already_published=already_published,
            warnings=list(plan.warnings), notes=list(plan.notes),
        )  # fmt: skip

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        self._say("nodes", nodes=[node.model_dump(mode="json") for node in nodes], warnings=list(warnings))

    def on_event(self, event: AnyEvent) -> None:
        step = self._plan.step(event.digest).name if self._plan else ""
        self._say(event.type, step=step, **event.model_dump(mode="json", exclude={"type"}))

    def on_retry(self, command: Start) -> None:
        self._say(
            "retry",
            step=command.step.name,
            digest=command.step.digest,
            attempt=command.attempt,
            delay_seconds=command.delay_seconds,
        )

    def on_finish(self, plan: Plan, result: Finished) -> None:
        self._say("finish", ran=sorted(plan.step(digest).name for digest in result.ran))


def plan_table(plan: Plan) -> Table:
    """The plan for people: what each step reads, writes and reserves."""
    table = Table("step", "reads", "writes", "memory", "digest", "after", box=None, pad_edge=False)
    for step in plan.steps:
        needs = ", ".join(plan.step(need).name for need in step.needs)
        table.add_row(
            step.name,
            format_bytes(step.estimate.read_bytes),
            format_bytes(step.estimate.write_bytes),
            format_bytes(step.resources.memory_bytes),
            step.digest[:12],
            needs,
        )
    return table


def sweep_table(rows: Sequence[SweepRow]) -> Table:
    """Algorithms side by side: size, how far from the unquantized model, the worst linear."""
    table = Table("algorithm", "checkpoint", "perplexity", "KL", "top-1", "worst linear", "its error", box=None, pad_edge=False)
    for row in rows:
        found = row.verification
        table.add_row(
            row.algorithm,
            format_bytes(row.checkpoint_bytes),
            "" if found.perplexity_ratio is None else f"x {found.perplexity_ratio:.3f}",
            f"{found.mean_kl:.2e}",
            f"{found.top1_agreement:.3f}",
            row.worst_linear,
            f"{row.worst_error:.3f}" if row.worst_linear else "",
        )
    return table


def stage_table(plan: Plan) -> Table:
    """The pipeline stages: layers, ranks, bytes per rank, conversion tasks."""
    table = Table("stage", "layers", "ranks", "bytes per rank", "shards", box=None, pad_edge=False)
    topology = plan.topology
    for pp_rank, layers in enumerate(topology.stages(plan.inputs.config.num_hidden_layers)):
        groups = plan.inputs.weights.stage(pp_rank)
        ranks = f"{topology.rank(0, pp_rank)}-{topology.rank(topology.tp - 1, pp_rank, topology.cp - 1)}"
        size = format_bytes(sum(group.shard_bytes for group in groups))
        table.add_row(str(pp_rank), f"{layers.start}-{layers.stop - 1}", ranks, size, str(len(groups)))
    return table


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan for machines, and for golden files: everything but places."""
    read = sum(step.estimate.read_bytes for step in plan.of_kind(Kind.CONVERT))
    return {
        "build_key": plan.build_key,
        "architecture": plan.inputs.config.architecture,
        "dtype": plan.inputs.config.dtype,
        "topology": {"tp": plan.topology.tp, "pp": plan.topology.pp},
        "stages": [[layers.start, layers.stop] for layers in plan.topology.stages(plan.inputs.config.num_hidden_layers)],
        "source_bytes": plan.inputs.index.num_bytes,
        "convert_read_bytes": read,
        "ignored": [list(item) for item in plan.inputs.weights.ignored],
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
        "steps": [
            {
                "name": step.name,
                "kind": step.kind.value,
                "digest": step.digest,
                "needs": [plan.step(need).name for need in step.needs],
                "read_bytes": step.estimate.read_bytes,
                "write_bytes": step.estimate.write_bytes,
            }
            for step in plan.steps
        ],
    }


def counted(items: Iterable[str]) -> dict[str, int]:
    """How often each item occurs, in order of first occurrence."""
    counts: dict[str, int] = defaultdict(int)
    for item in items:
        counts[item] += 1
    return dict(counts)
