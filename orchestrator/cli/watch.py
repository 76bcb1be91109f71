"""`orchestrator watch`: a build looked at through its store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import following
from orchestrator.cli.console import Json, exit_codes
from orchestrator.spec.cluster import StoreOptions

app = typer.Typer()


@app.command()
def watch(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of the store, or of a release in it; a folder is one too.")],
    build: Annotated[str, typer.Option("--build", help="Build key, or its beginning; absent: the newest run.")] = "",
    cluster: Annotated[Path | None, typer.Option("--cluster", help="Cluster file: how its store is reached.")] = None,
    as_json: Json = False,
) -> None:
    """Follow a build from anywhere, or replay one that has ended; ends with its exit code. Ctrl-C only detaches."""
    with exit_codes(as_json):
        from orchestrator.spec.loading import load_cluster, resolve_store
        from orchestrator.stores import open_store
        from orchestrator.submit.watching import Watch, find_run

        place, _, release = resolve_store(url, Path.cwd()).partition("/releases/")
        options = load_cluster(cluster).store_options if cluster else StoreOptions()
        store = open_store(place, options)
        run = find_run(store, release.removesuffix("/manifest.json").strip("/"), build)
        following.show_build(Watch(store, run), as_json, "the build")
