"""Plans, steps and sweeps as tables for people, and as plain facts for machines."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.table import Table

from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome


def format_bytes(count: float) -> str:
    """Format bytes in decimal units, e.g. 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_count(count: int, what: str) -> str:
    """Format a number with a noun: 1 node, 2 nodes."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def format_seconds(seconds: float) -> str:
    """Format a duration: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    first, second = (
        (f"{whole // 60} min", f"{whole % 60} s") if whole < 7200 else (f"{whole // 3600} h", f"{whole % 3600 // 60} min")
    )
    return first if second.startswith("0 ") else f"{first} {second}"


def step_table(steps: Iterable[tuple[str, str, Outcome | None]], ran: Collection[str]) -> Table:
    """Return node, seconds and bytes written of each step (name, digest, outcome), and whether it is in `ran`, by name."""
    table = Table("step", "node", "seconds", "written", "digest", "", box=None, pad_edge=False)
    for name, digest, outcome in steps:
        if outcome is None:
            table.add_row(name, "", "", "", digest[:12], "not run")
            continue
        written = format_bytes(sum(output.num_bytes for output in outcome.outputs))
        state = "run" if name in ran else "cached"
        table.add_row(name, outcome.node, f"{outcome.seconds:.1f}", written, digest[:12], state)
    return table


def plan_table(plan: Plan) -> Table:
    """Return the plan for people: bytes that each step reads, writes and reserves."""
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


def stage_table(plan: Plan) -> Table:
    """Return the pipeline stages: layers, ranks, bytes per rank, conversion tasks."""
    table = Table("stage", "layers", "ranks", "bytes per rank", "shards", box=None, pad_edge=False)
    topology = plan.topology
    for pp_rank, layers in enumerate(topology.stages(plan.inputs.config.num_hidden_layers)):
        groups = plan.inputs.weights.stage(pp_rank)
        ranks = f"{topology.rank(0, pp_rank)}-{topology.rank(topology.tp - 1, pp_rank, topology.cp - 1)}"
        size = format_bytes(sum(group.shard_bytes for group in groups))
        table.add_row(str(pp_rank), f"{layers.start}-{layers.stop - 1}", ranks, size, str(len(groups)))
    return table


def experts_lines(plan: Plan) -> list[str]:
    """Return a line for each run of stages whose experts have one form: the form, why, and the weights that a decode step reads."""
    lines = []
    for (form, reason), group in groupby(enumerate(plan.decode_reads()), key=lambda item: (item[1].form, item[1].reason)):
        stages = list(group)
        first, last = stages[0][0], stages[-1][0]
        gathered, dense = (max(getattr(reads, name) for _, reads in stages) for name in ("gathered", "dense"))
        where = f"stages {first}-{last}" if last > first else f"stage {first}"
        lines.append(
            f"experts of {where}: {form} ({reason}). A decode step of one sequence reads {format_bytes(gathered)} of weights on a "
            f"rank where they are gathered, {format_bytes(dense)} where they are dense."
        )
    return lines


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return the plan for machines, and for golden files: everything but paths."""
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
        **({"decode_reads": [asdict(reads) for reads in plan.decode_reads()]} if plan.inputs.config.moe else {}),
        "steps": [
            {
                "name": step.name,
                "kind": step.kind.value,
                "digest": step.digest,
                "needs": [plan.step(need).name for need in step.needs],
                "read_bytes": step.estimate.read_bytes,
                "write_bytes": step.estimate.write_bytes,
                "memory_bytes": step.resources.memory_bytes,
                "scratch_bytes": step.resources.scratch_bytes,
                "gpus": step.resources.gpus,
                "seconds": round(step.estimate.seconds, 3),
            }
            for step in plan.steps
        ],
    }
