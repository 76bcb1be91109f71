"""`orchestrator watch`: follow a build through its store."""

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
        following.show_build(Watch(store, run), as_json, "the build")
