"""Show a build that runs elsewhere, on a terminal or as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from orchestrator.cli.console import out, plain
from orchestrator.planning.facts import Verification

if TYPE_CHECKING:
    from orchestrator.events import Event, Published
    from orchestrator.submit.protocol import Followed, Notice

_DETACHED = 130


def show_build(
    followed: Followed, as_json: bool, name: str, commands: Sequence[str] = (), lines: Iterable[str] | None = None
) -> None:
    """Show a build to its end and raise its error. On Ctrl-C, end the command and print `commands` as next steps.

    With `lines`, these are printed in place of the events, and the outcome is among them.
    """
    from orchestrator.report import LiveView
    from orchestrator.submit.follow import follow
    from orchestrator.submit.protocol import Notice

    view = LiveView(out)

    def show(item: Event | Notice | str) -> None:
        if as_json or isinstance(item, str):
            _print_line(item)
        elif isinstance(item, Notice):
            out.print(f"[yellow]{plain(item.text)}[/]" if item.kind == "trouble" else plain(item.text), soft_wrap=True)
        else:
            view.on(item)

    with view:
        made = follow(followed, show, lines)
    if made is None:
        if not as_json:
            out.print(f"Detached; {name} keeps running.")
            for command in commands:
                out.print(f"  {command}", soft_wrap=True)
        raise typer.Exit(_DETACHED)
    if as_json:
        _print_line(made)
    elif lines is None:
        _show_published(made)


def _print_line(item: Event | Notice | str) -> None:
    from orchestrator.events import encode_line
    from orchestrator.submit.protocol import Notice

    if isinstance(item, Notice):
        item = json.dumps({"event": item.kind, **item.fields})
    print(item if isinstance(item, str) else encode_line(item), flush=True)


def _show_published(made: Published) -> None:
    if made.verification:
        found = Verification.model_validate(made.verification)
        out.print(
            f"verified on {found.num_positions} positions: max relative error {found.relative_errors()}, "
            f"top-1 agreement {found.top1_agreement:.3f}"
        )
    out.print(f"published: {made.manifest}", soft_wrap=True)
