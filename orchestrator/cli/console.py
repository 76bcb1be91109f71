"""Output and errors of all commands: text or JSON, and exit codes."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from orchestrator.base.errors import ADVICE_BYTES, MESSAGE_BYTES, OrchestratorError, SpecError, abbreviated, bounded, interruption
from orchestrator.base.extras import missing_extra
from orchestrator.cli.stopping import stoppable
from orchestrator.spec.cluster import ClusterSpec

_WIDTH = None if sys.stdout.isatty() else 160
# Without emoji codes: build/rank3:x: is a step and an attempt.
out = Console(highlight=False, emoji=False, width=_WIDTH)
_err = Console(stderr=True, highlight=False, emoji=False, width=_WIDTH)
_verbose = False
_LINE_BYTES = 4000

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="Build spec, YAML.")]
StoreUrl = Annotated[str | None, typer.Option("--store", help="Store URL or folder; overrides the cluster file's.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]
Ranks = Annotated[str, typer.Option("--rank", help="A rank, a list such as 0,1, or all.")]
ClusterFile = Annotated[Path | None, typer.Option("--cluster", help="Cluster file, YAML; absent: run on this machine.")]
PublicKey = Annotated[
    Path | None, typer.Option("--public-key", help="Public key (PEM, P-256); refuse a release that is not signed with it.")
]


@contextmanager
def exit_codes(as_json: bool = False) -> Iterator[None]:
    """Print every error of a user's situation in a few lines and exit with its code; Ctrl-C and SIGTERM too, see stopping.py."""
    with stoppable() as stopping:
        stopping.report = lambda error: show_error(error, as_json)
        try:
            yield
        except typer.Exit as error:  # its output was already shown
            raise typer.Exit(interruption(stopping.number).exit_code if stopping.number else error.exit_code) from None
        except BaseException as error:
            _fail(_as_ours(error, stopping.behind(error)), as_json)
        if stopping.number:  # the exception was lost in native code
            _fail(interruption(stopping.number), as_json)


_USAGE: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
_OF_THE_COMMAND_LINE = (typer.Exit, typer.Abort, _USAGE, BrokenPipeError)
"""Exceptions by which typer ends a command or shows its usage, and the one of a closed output pipe."""


def start(verbose: bool) -> None:
    """Begin a command line, dropping the settings of an earlier one in this process."""
    global _verbose
    _verbose = verbose
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")


def _as_ours(error: BaseException, number: int) -> OrchestratorError:
    """Return the error of a command; after a signal it is the signal's, whatever else was raised. Raises typer's exceptions."""
    if number:
        return interruption(number)
    if isinstance(error, KeyboardInterrupt):
        return interruption(signal.SIGINT)
    if isinstance(error, OrchestratorError):
        return error
    if isinstance(error, _OF_THE_COMMAND_LINE) or not isinstance(error, Exception):
        raise error
    return missing_extra(error) or _bug(error)


def _bug(error: Exception) -> OrchestratorError:
    """Turn any other exception into an error of one line, with its traceback if --verbose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    made = OrchestratorError(
        f"a bug of this program: {type(error).__name__}: {abbreviated(str(error), 1000)} ({where})",
        "Run the command again with -v, and report its output together with your input.",
    )
    made.__cause__ = error
    return made


def show_error(error: OrchestratorError, as_json: bool) -> None:
    """Print an error for people or machines, in at most 4 kB; if --verbose, with its traceback."""
    if _verbose:
        _err.print(Text(printable("".join(traceback.format_exception(error)))), soft_wrap=True)
    if as_json:
        print(_event_line(error), flush=True)
        return
    # Escaping makes text longer.
    _err.print(Text("error: ", "bold red").append(bounded(printable(error.message), MESSAGE_BYTES), "not bold default"))
    if error.advice:
        _err.print(Text("  " + bounded(printable(error.advice), ADVICE_BYTES)))


def _event_line(error: OrchestratorError) -> str:
    from orchestrator.events import Errored, encode_line

    event = Errored.of(error)
    if type(error) is OrchestratorError and error.__cause__ is not None:
        event = event.model_copy(update={"error": type(error.__cause__).__name__})
    while len(line := encode_line(event)) > _LINE_BYTES:
        message, advice = (bounded(text, len(text) // 2 + 50) for text in (event.message, event.advice))
        event = event.model_copy(update={"message": message, "advice": advice})
    return line


def _fail(error: OrchestratorError, as_json: bool) -> NoReturn:
    show_error(error, as_json)
    raise typer.Exit(error.exit_code)


def place_of(cluster: Path | None, store: str | None) -> ClusterSpec:
    """Return the cluster file's spec, with --store replacing its store; without a file, this machine. Raises SpecError."""
    from orchestrator.spec.loading import load_cluster, resolve_store

    url = resolve_store(store, Path.cwd()) if store else None
    if cluster is not None:
        spec = load_cluster(cluster)
        return spec.model_copy(update={"store": url}) if url else spec
    if url is None:
        raise SpecError("neither --cluster nor --store was given", "Pass --store FOLDER to build with this machine's processes.")
    return ClusterSpec(store=url)


def plain(text: str) -> str:
    """Return `text` without rich markup and terminal control sequences."""
    return escape(printable(text))


def printable(text: str) -> str:
    """Return `text` with control characters and lone surrogates escaped."""
    return "".join(character if character.isprintable() or character in "\n\t" else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def show(facts: dict[str, Any], tables: list[Table], as_json: bool) -> None:
    """Print facts for machines, or tables for people."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for table in tables:
        out.print(table)
        out.print()


def show_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print named facts. For people, without empty ones and with one line per list entry."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        for line in value if isinstance(value, list) else [value]:
            if line not in (None, ""):
                out.print(f"{name:<12} {plain(str(line))}", soft_wrap=True)


def parse_ranks(text: str) -> list[int] | None:
    """Parse the value of --rank; None for all. Raises SpecError."""
    if text == "all":
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise SpecError(
            f"--rank {text!r} is neither a number, a list of numbers, nor all", "E.g. --rank 0 or --rank 0,1."
        ) from None
