"""Show a build that runs elsewhere, on a terminal or as JSON lines; `orchestrator watch` follows one through its store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import Json, exit_codes, out, plain
from orchestrator.planning.facts import Verification
from orchestrator.spec.cluster import StoreOptions

if TYPE_CHECKING:
    from orchestrator.events import Event, Published
    from orchestrator.submit.protocol import Followed, Notice

app = typer.Typer()

_DETACHED = 130


@app.command()
def watch(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL or folder of the store, or of a release in it.")],
    build: Annotated[str, typer.Option("--build", help="Build key, or its first digits; absent: the newest run.")] = "",
    cluster: Annotated[Path | None, typer.Option("--cluster", help="Cluster file with the connection to the store.")] = None,
    as_json: Json = False,
) -> None:
    """Follow a build from anywhere, or replay an ended one; exits with its code. Ctrl-C only detaches."""
    with exit_codes(as_json):
        from orchestrator.spec.loading import load_cluster, resolve_store
        from orchestrator.stores import open_store
        from orchestrator.submit.watching import Watch, find_run

        place, _, release = resolve_store(url, Path.cwd()).partition("/releases/")
        options = load_cluster(cluster).store_options if cluster else StoreOptions()
        store = open_store(place, options)
        run = find_run(store, release.removesuffix("/manifest.json").strip("/"), build)
        show_build(Watch(store, run), as_json, "the build")


def show_build(
    followed: Followed, as_json: bool, name: str, commands: Sequence[str] = (), lines: Iterable[str] | None = None
) -> None:
    """Show a build to its end and raise its error. On Ctrl-C, end the command and print `commands` as next steps.

    With `lines`, these are printed in place of the events, and the outcome is among them.
    """
    from orchestrator.events import Errored, Published
    from orchestrator.report import LiveView
    from orchestrator.submit.protocol import Notice

    def show(item: Event | Notice | str) -> None:
        if as_json or isinstance(item, str):
            _print_line(item)
        elif isinstance(item, Notice):
            out.print(f"[yellow]{plain(item.text)}[/]" if item.kind == "trouble" else plain(item.text), soft_wrap=True)
        else:
            view.on(item)

    try:
        with LiveView(out) as view:
            for item in lines or followed.events():
                if not isinstance(item, (Published, Errored)):  # the final event of an attempt need not be the build's
                    show(item)
    except KeyboardInterrupt:
        if not as_json:
            out.print("\n  ".join([f"Detached; {name} keeps running.", *commands]), soft_wrap=True)
        raise typer.Exit(_DETACHED) from None
    made = followed.result()
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
        out.print(f"verified on {Verification.model_validate(made.verification).line()}")
    out.print(f"published: {made.manifest}", soft_wrap=True)
