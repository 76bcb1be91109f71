"""Commands about model families: which there are, and what a model lacks to be of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.console import Json, exit_codes, out, plain, show

if TYPE_CHECKING:
    from orchestrator.family_check import FamilyCheck

app = typer.Typer(no_args_is_help=True)


@app.callback()
def family() -> None:
    """Print model families, and check a model against one."""


@app.command("list")
def list_families(as_json: Json = False) -> None:
    """Print the families with their architectures, and the larger models whose language model is read."""
    with exit_codes(as_json):
        from orchestrator.families import FAMILIES
        from orchestrator.families.wrappers import WRAPPERS

        table = Table("family", "architectures", "experts", "latent attention", box=None, pad_edge=False)
        facts: dict[str, Any] = {"families": {}, "larger_models": sorted(WRAPPERS)}
        for each in sorted(FAMILIES.values(), key=lambda each: each.name):
            experts, latent = each.config.experts is not None, each.config.latent
            table.add_row(each.name, ", ".join(each.architectures), "yes" if experts else "", "yes" if latent else "")
            facts["families"][each.name] = {"architectures": list(each.architectures), "experts": experts, "latent": latent}
        show(facts, [table], as_json)
        if not as_json:
            out.print(f"\nLanguage models within larger models: {', '.join(sorted(WRAPPERS))}", soft_wrap=True)


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="Folder or URL of a checkpoint, or a config.json.")],
    family: Annotated[str, typer.Option("--family", help="Family to check against; auto: the architecture's.")] = "auto",
    ignored: Annotated[list[str] | None, typer.Option("--ignore-key", help="Key of config.json to pass over; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Check a model against a family's table, and print everything that is missing.

    Three checks: keys of config.json; tensors that no rule reads, that are missing, or of another shape; and a small model of the
    config, computed here and by transformers, which names the first layer and part that differ. Exit code 0: all agree; else that
    of the first problem.
    """
    with exit_codes(as_json):
        from orchestrator import family_check
        from orchestrator.stores.hub import pinned

        found = family_check.check_family(pinned(source), family, ignored or ())
        show(found.facts(), [_table(found)], as_json)
        if not as_json:
            _print_problems(found)
        if found.problems:
            raise typer.Exit(found.problems[0].exit_code)


def _table(found: FamilyCheck) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    within = f", the language model of {found.part_of}" if found.part_of else ""
    table.add_row("architecture", plain(found.architecture + within))
    table.add_row("family", found.family or "none knows it")
    for each in found.nearest:
        table.add_row("", plain(f"{each.family}: {each.line()}"))
    if found.accounting is not None:
        counts = found.accounting
        where = " of transformers' small model" if found.is_of_miniature else ""
        table.add_row(
            "tensors" + where,
            f"{len(counts.read)} read, {len(counts.ignored)} left out, {len(counts.unread)} without a rule, "
            f"{len(counts.missing)} missing, {len(counts.misshapen)} of another shape",
        )
    if found.family and not found.is_computed:
        table.add_row("small model", "not computed: the table does not add up yet")
    if found.miniature is not None:
        cases = ", ".join(f"{case.ranks} {case.max_relative_error:.1e}" for case in found.miniature.cases)
        table.add_row("small model", f"computes what transformers does: {cases}")
    if found.defaults:
        table.add_row("defaults", plain(found.defaults))
    return table


def _print_problems(found: FamilyCheck) -> None:
    for number, problem in enumerate(found.problems, 1):
        out.print(f"[red]{number}.[/] {plain(problem.message)}", soft_wrap=True)
        if problem.advice:
            out.print(f"   {plain(problem.advice)}", soft_wrap=True)
    count = len(found.problems)
    out.print(f"{count} problem{'s' if count > 1 else ''}." if count else "Nothing is missing.")
