"""Commands that build nothing: plan, with a simulation of the build, and rates measured in a build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from orchestrator.base.errors import SpecError
from orchestrator.cli.console import ClusterFile, Json, SpecFile, StoreUrl, exit_codes, out, place_of, plain, show
from orchestrator.spec.cluster import ClusterSpec

if TYPE_CHECKING:
    from orchestrator.clusters.simulation import Simulation
    from orchestrator.planning.plan import Plan

app = typer.Typer()

_COLUMNS = 60
"""Columns of the timeline."""


@app.command()
def plan(
    spec: SpecFile,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate the build on the cluster.")] = False,
    cluster: ClusterFile = None,
    rates: Annotated[
        Path | None,
        typer.Option("--rates", help="Rates file, YAML (`orchestrator rates` prints one); absent: defaults."),
    ] = None,
    fail: Annotated[
        list[str] | None, typer.Option("--fail", help="STEP:ATTEMPT[:KIND] to fail, e.g. build/rank3:1; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print stages, steps and bytes, read from the checkpoint's headers only.

    With --simulate, drive the plan on a simulated cluster and print makespan, timeline, use, bytes and cost. The cluster file gives
    the nodes and their CPUs, GPUs and memory (pools.NAME.nodes), the rates file speeds and prices. To measure the rates of your
    machines, build a model there and run `orchestrator rates SPEC --store STORE`.
    """
    with exit_codes(as_json):
        from orchestrator.planning import preparation
        from orchestrator.spec.loading import load_spec

        if not simulate and (cluster or rates or fail):
            raise SpecError("--cluster, --rates and --fail belong to --simulate", "Add --simulate.")
        plan = preparation.plan(load_spec(spec))
        if simulate:
            _simulate(plan, cluster, rates, fail or [], as_json)
        else:
            _print(plan, as_json)


def _print(plan: Plan, as_json: bool) -> None:
    from orchestrator.report import describe_plan, experts_lines, format_bytes, plan_table, stage_table

    facts = describe_plan(plan)
    show(facts, [stage_table(plan), plan_table(plan)], as_json)
    if as_json:
        return
    out.print(
        f"{plan.inputs.config.architecture}, {plan.inputs.config.dtype}: source {format_bytes(facts['source_bytes'])}, "
        f"conversion reads {format_bytes(facts['convert_read_bytes'])}. Build key {plan.build_key[:16]}."
    )
    for name, reason in facts["ignored"]:
        out.print(f"left out: {name} ({reason})")
    for line in experts_lines(plan):
        out.print(plain(line), soft_wrap=True)
    for note in facts["notes"]:
        out.print(f"note: {plain(note)}", soft_wrap=True)
    for warning in facts["warnings"]:
        out.print(f"[yellow]warning:[/] {plain(warning)}", soft_wrap=True)


def _simulate(plan: Plan, cluster: Path | None, rates: Path | None, fail: list[str], as_json: bool) -> None:
    from orchestrator.clusters import simulation
    from orchestrator.report import format_bytes
    from orchestrator.spec.loading import load_cluster, load_rates
    from orchestrator.spec.rates import RatesSpec

    place = load_cluster(cluster) if cluster else ClusterSpec(store="memory://simulation")
    speeds = load_rates(rates) if rates else RatesSpec()
    found = simulation.simulate(plan, place, speeds, simulation.parse_failures(fail, plan))
    show(found.facts(), [_timeline(found), _pools(found)], as_json)
    if as_json:
        return
    vague = [name for name, pool in place.pools.items() if pool.cpus is None or pool.memory is None]
    if vague:
        out.print(f"note: CPUs or memory of {', '.join(vague)} are not in the cluster file: this machine's are assumed")
    out.print(
        f"makespan {found.makespan_seconds:,.1f} s; the critical path alone takes {found.critical_seconds:,.1f} s: "
        + " -> ".join(found.critical_path),
        soft_wrap=True,
    )
    for name, link in found.links.items():
        full = f", {link.utilization:.0%} of its limit" if link.utilization is not None else ""
        out.print(f"{name}: {format_bytes(link.num_bytes)}{full}")
    out.print(f"attempts beyond the first: {found.retries}; cost: {found.cost:,.2f}")
    for name, reason in found.failures.items():
        out.print(f"[red]the build would fail:[/] {name}: {plain(reason)}", soft_wrap=True)


def _timeline(found: Simulation) -> Table:
    from orchestrator.clusters.simulation import timeline

    table = Table("pool", "kind", f"0 to {found.makespan_seconds:,.1f} s", "at once", box=None, pad_edge=False)
    for pool, kind, bars, most in timeline(found.spans, found.makespan_seconds, _COLUMNS):
        table.add_row(pool, kind.value, bars, str(most))
    return table


def _pools(found: Simulation) -> Table:
    from orchestrator.report import format_bytes

    table = Table(
        "pool", "nodes", "slots", "slots busy", "memory per node", "from store", "to store", "cost", box=None, pad_edge=False
    )
    for name, use in found.pools.items():
        table.add_row(
            name, str(use.nodes), str(use.slots), f"{use.busy_seconds:,.1f} s, {use.utilization:.0%}",
            format_bytes(use.peak_memory_bytes), format_bytes(use.read_bytes), format_bytes(use.write_bytes), f"{use.cost:,.2f}",
        )  # fmt: skip
    return table


@app.command()
def rates(spec: SpecFile, cluster: ClusterFile = None, store: StoreUrl = None) -> None:
    """Print the step rates measured in a finished build of SPEC, as a file for `plan --simulate --rates`.

    The seconds of a step include its transfers. Add `network`, `disk` or `store_read` to these rates only for what a place adds to
    the place where they were measured.
    """
    with exit_codes():
        import yaml

        from orchestrator.clusters import simulation
        from orchestrator.planning import preparation
        from orchestrator.scheduling import commits
        from orchestrator.spec.loading import load_spec
        from orchestrator.stores import open_store

        cluster_spec = place_of(cluster, store)
        plan = preparation.plan(load_spec(spec))
        committed = commits.committed(
            open_store(cluster_spec.store, cluster_spec.store_options), (step.digest for step in plan.steps)
        )
        found = simulation.measured(plan, committed)
        if not found:
            raise SpecError(f"{cluster_spec.store} has no finished step of this plan", "Build the model there first.")
        print(f"# {len(committed)} of {len(plan.steps)} steps of {plan.build_key[:16]}, seen in {cluster_spec.store}")
        print(yaml.safe_dump({"steps": {kind: rate.model_dump() for kind, rate in found.items()}}, sort_keys=False), end="")
