"""What every command shares: how it prints, in words or JSON, and how an error becomes an exit code."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from orchestrator.cli.stopping import stoppable
from orchestrator.core.errors import OrchestratorError, SpecError, interruption
from orchestrator.core.manifest import Verification
from orchestrator.core.spec import ClusterSpec

if TYPE_CHECKING:
    from orchestrator.following import Published

_WIDTH = None if sys.stdout.isatty() else 160
# Without emoji codes: build/rank3:x: is a step and an attempt.
out = Console(highlight=False, emoji=False, width=_WIDTH)
_err = Console(stderr=True, highlight=False, emoji=False, width=_WIDTH)

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="Build spec, YAML.")]
StoreUrl = Annotated[str | None, typer.Option("--store", help="Store URL or folder; overrides the cluster file's.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]
Ranks = Annotated[str, typer.Option("--rank", help="A rank, a list such as 0,1, or all.")]
ClusterFile = Annotated[Path | None, typer.Option("--cluster", help="Cluster file, YAML; absent: processes of this machine.")]
PublicKey = Annotated[
    Path | None, typer.Option("--public-key", help="PEM, P-256: refuse a release that is not signed with this key.")
]


@contextmanager
def exit_codes(as_json: bool = False) -> Iterator[None]:
    """Every error of a user's situation in a few lines, with its own exit code; Ctrl-C and SIGTERM too, see stopping.py."""
    with stoppable() as stopping:
        stopping.report = lambda error: show_error(error, as_json)
        try:
            yield
        except typer.Exit as error:  # what was to be shown has been shown
            raise typer.Exit(interruption(stopping.number).exit_code if stopping.number else error.exit_code) from None
        except BaseException as error:
            _fail(_as_ours(error, stopping.number), as_json)
        if stopping.number:  # the exception was lost in native code
            _fail(interruption(stopping.number), as_json)


def _as_ours(error: BaseException, number: int) -> OrchestratorError:
    """What a command ends with. After a signal that is the signal, whatever it made others raise; raises what is not ours."""
    if number:
        return interruption(number)
    if isinstance(error, KeyboardInterrupt):
        return interruption(signal.SIGINT)
    if isinstance(error, OrchestratorError):
        return error
    raise error


def show_error(error: OrchestratorError, as_json: bool) -> None:
    """Print an error as people or machines read it."""
    if as_json:
        from orchestrator.following import Errored, encode_line

        print(encode_line(Errored.of(error, time.time())), flush=True)
        return
    _err.print(f"[bold red]error:[/] {plain(error.message)}")
    if error.advice:
        _err.print(f"  {plain(error.advice)}")


def _fail(error: OrchestratorError, as_json: bool) -> NoReturn:
    show_error(error, as_json)
    raise typer.Exit(error.exit_code)


def place_of(cluster: Path | None, store: str | None) -> ClusterSpec:
    """The cluster file, with --store in place of its own; without a file: this machine. Raises SpecError."""
    from orchestrator.loading import load_cluster, resolve_store

    url = resolve_store(store, Path.cwd()) if store else None
    if cluster is not None:
        spec = load_cluster(cluster)
        return spec.model_copy(update={"store": url}) if url else spec
    if url is None:
        raise SpecError("neither --cluster nor --store was given", "Pass --store FOLDER to build with this machine's processes.")
    return ClusterSpec(store=url)


def plain(text: str) -> str:
    """`text` without what rich takes for markup."""
    return text.replace("[", "\\[")


def show(facts: dict[str, Any], tables: list[Table], as_json: bool) -> None:
    """Print facts for machines or tables for people."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for table in tables:
        out.print(table)
        out.print()


def show_published(made: Published) -> None:
    """The last lines of a build that ran elsewhere."""
    if made.verification:
        found = Verification.model_validate(made.verification)
        out.print(
            f"verified on {found.num_positions} positions: max relative error {found.relative_errors()}, "
            f"top-1 agreement {found.top1_agreement:.3f}"
        )
    out.print(f"published: {made.manifest}", soft_wrap=True)


def parse_ranks(text: str) -> list[int] | None:
    """The value of --rank; None for all. Raises SpecError."""
    if text == "all":
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise SpecError(
            f"--rank {text!r} is neither a number, a list of numbers, nor all", "E.g. --rank 0 or --rank 0,1."
        ) from None
