"""`orchestrator watch`: a build looked at through its store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import Json, exit_codes, out, show_published
from orchestrator.spec.cluster import StoreOptions

if TYPE_CHECKING:
    from orchestrator.submit.watching import Watch

app = typer.Typer()


@app.command()
def watch(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the store, or of a release in it; a folder is one too.")],
    build: Annotated[str, typer.Option("--build", help="Build key, or its beginning; absent: the newest run.")] = "",
    cluster: Annotated[Path | None, typer.Option("--cluster", help="Cluster file: how its store is reached.")] = None,
    as_json: Json = False,
) -> None:
    """Follow a build from anywhere, or replay one that has ended; ends with its exit code. Ctrl-C only looks away."""
    with exit_codes(as_json):
        from orchestrator.spec.loading import load_cluster, resolve_store
        from orchestrator.stores import open_store
        from orchestrator.submit.watching import Watch, find_run

        place, _, release = resolve_store(url, Path.cwd()).partition("/releases/")
        options = load_cluster(cluster).store_options if cluster else StoreOptions()
        store = open_store(place, options)
        run = find_run(store, release.removesuffix("/manifest.json").strip("/"), build)
        watched = Watch(store, run)
        if as_json:
            _print_lines(watched)
        else:
            _show(watched)


def _print_lines(watched: Watch) -> None:
    from orchestrator.events.builds import Errored, encode_line

    last = None
    try:
        for last in watched.events():
            print(encode_line(last), flush=True)
    except KeyboardInterrupt:  # nothing is said: the last line is the build's own
        raise typer.Exit(130) from None
    if isinstance(last, Errored):  # its line has been printed
        raise typer.Exit(last.exit_code)
    watched.conclusion()


def _show(watched: Watch) -> None:
    from orchestrator.report import LiveView

    view = LiveView(out)
    try:
        for event in watched.events():
            view.on(event)
    except KeyboardInterrupt:
        view.close()
        out.print("Looked away; the build goes on.")
        raise typer.Exit(130) from None
    finally:
        view.close()
    show_published(watched.conclusion())
