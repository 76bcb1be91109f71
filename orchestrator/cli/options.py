"""Options of every command line: -h, --version, -v."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from orchestrator.base.errors import SpecError
from orchestrator.base.urls import refuse_secrets
from orchestrator.cli import console

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
_VERBOSE = {"-v", "--verbose"}


class Root(TyperGroup):
    """Root of the command line. --verbose may stand anywhere, so that it can be appended to a command that has just failed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        kept = [word for word in args[:end] if word not in _VERBOSE] + args[end:]
        console.start(verbose=len(kept) < len(args))
        try:
            refuse_secrets(args)
        except SpecError as error:  # usage errors quote the command line, which starts at the first word
            console.show_error(error, "--json" in args)
            raise typer.Exit(error.exit_code) from None
        return super().parse_args(ctx, kept)


def _print_version(value: bool) -> None:
    if value:
        import importlib.metadata

        print(f"orchestrator {importlib.metadata.version('trt-orchestrator')}")
        raise typer.Exit


def root(
    _verbose: bool = typer.Option(
        False, "-v", "--verbose", help="Print tracebacks of errors and libraries' log lines; works with every command."
    ),
    _version: bool = typer.Option(False, "--version", is_eager=True, callback=_print_version, help="Print the version."),
) -> None:
    """Build, verify and publish TensorRT engines of large language models."""
