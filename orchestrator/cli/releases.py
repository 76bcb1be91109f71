"""Commands for those who use releases: pull, verify, releases, tag, collect."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.console import Json, PublicKey, Ranks, exit_codes, out, parse_ranks, plain, show
from orchestrator.core.errors import SpecError
from orchestrator.core.spec import StoreOptions

if TYPE_CHECKING:
    from orchestrator.releases import Collected, Listed

app = typer.Typer()

Url = Annotated[str, typer.Argument(metavar="URL", help="URL of a release, <store>/releases/<name>/<version>, or of a tag.")]
Options = Annotated[
    Path | None,
    typer.Option("--cluster", help="Cluster file: its store, and how that is reached."),
]


@app.command()
def pull(
    url: Url,
    rank: Ranks = "all",
    node: Annotated[int | None, typer.Option("--node", min=0, help="Number of a node: its ranks.")] = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="Ranks of a node.")] = 8,
    output: Annotated[Path, typer.Option("--output", help="Folder to write to.")] = Path("engines"),
    layout: Annotated[str, typer.Option("--layout", help="flat, trtllm, triton or oci.")] = "flat",
    public_key: PublicKey = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Whether this machine can run the engines.")] = True,
    cluster: Options = None,
) -> None:
    """Fetch what a rank or a node needs; every byte is checked. Run it again after any interruption: it goes on where it was."""
    with exit_codes():
        from orchestrator import releases

        ranks = parse_ranks(rank)
        paths = releases.pull(
            _address(url),
            output,
            ranks=ranks,
            node=node,
            gpus_per_node=gpus_per_node,
            layout=layout,
            public_key=public_key,
            check=check,
            options=_options(cluster),
            progress=lambda file: out.print(f"  {file.sha256[:16]}  {file.path}"),
        )
        signed = f", signed with the key of {public_key}" if public_key else ""
        out.print(f"{len(paths)} files in {output}, every digest right{signed}")


@app.command()
def verify(url: Url, public_key: PublicKey = None, cluster: Options = None, as_json: Json = False) -> None:
    """Read a whole release again: every digest, and the signature with --public-key."""
    with exit_codes(as_json):
        from orchestrator import releases
        from orchestrator.report import format_bytes

        found = releases.verify(_address(url), public_key, _options(cluster))
        signature = (
            f"signed with the key of {public_key}" if public_key else "signed, not checked" if found.is_signed else "not signed"
        )
        if as_json:
            facts = {"files": found.num_files, "bytes": found.num_bytes, "manifest": found.release.digest, "signature": signature}
            print(json.dumps(facts))
        else:
            out.print(
                f"{found.release.title}: {found.num_files} files, {format_bytes(found.num_bytes)}, every digest right; {signature}"
            )


@app.command("releases")
def list_(
    store: Annotated[str | None, typer.Argument(metavar="[STORE]", help="URL or folder; absent: the cluster file's.")] = None,
    cluster: Options = None,
    select: Annotated[
        list[str] | None, typer.Option("--select", metavar="NAME=VALUE", help="backend, precision, tp, pp or gpu; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the releases of a store."""
    with exit_codes(as_json):
        from orchestrator import releases

        selectors = dict(_pair(text) for text in select or [])
        found = releases.list_releases(_store(store, cluster), selectors, _options(cluster))
        _show_listed(found, as_json)


def _show_listed(found: list[Listed], as_json: bool) -> None:
    from rich.table import Table

    from orchestrator.report import format_bytes

    table = Table(
        "release", "created", "model", "precision", "tp x pp", "built for", "size", "signed", "tags", box=None, pad_edge=False
    )
    facts: list[dict[str, Any]] = []
    for item in found:
        manifest = item.manifest
        facts.append({"release": item.folder, "problem": item.problem, "signed": item.is_signed, "tags": list(item.tags)})
        if manifest is None:
            table.add_row(item.folder.removeprefix("releases/"), plain(item.problem))
            continue
        choice = manifest.selectors
        facts[-1] |= {"created_at": manifest.created_at, "bytes": manifest.num_bytes, "selectors": choice.model_dump()}
        table.add_row(
            item.folder.removeprefix("releases/"), manifest.created_at, manifest.model.architecture, choice.precision,
            f"{choice.tp} x {choice.pp}", f"{choice.backend}, {choice.gpu}", format_bytes(manifest.num_bytes),
            "yes" if item.is_signed else "no", ", ".join(item.tags),
        )  # fmt: skip
    show({"releases": facts}, [table] if found else [], as_json)
    if not found and not as_json:
        out.print("No release is there, or none that was selected: without --select all are listed, each with its precision.")


@app.command()
def tag(
    url: Url,
    name: Annotated[str, typer.Argument(metavar="NAME", help="E.g. prod or llama/prod.")],
    cluster: Options = None,
) -> None:
    """Let a name stand for a release; `pull STORE/tags/NAME` follows it."""
    with exit_codes():
        from orchestrator import releases

        made = releases.tag(_address(url), name, _options(cluster))
        out.print(f"{made.name} (version {made.number}) is {made.release}, manifest {made.manifest_sha256[:16]}")


@app.command()
def collect(
    store: Annotated[str | None, typer.Argument(metavar="[STORE]", help="URL or folder; absent: the cluster file's.")] = None,
    grace_days: Annotated[
        float, typer.Option("--grace-days", min=0, help="Keep what was first seen unneeded since; longer than the longest build.")
    ] = 7.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it nothing is.")] = False,
    cluster: Options = None,
    as_json: Json = False,
) -> None:
    """Find what no release and no running build needs, and delete it with --delete."""
    with exit_codes(as_json):
        from orchestrator import releases

        grace = datetime.timedelta(days=grace_days)
        found = releases.collect(_store(store, cluster), grace, delete=delete, options=_options(cluster))
        _show_collected(found, grace_days, as_json)


def _show_collected(found: Collected, grace_days: float, as_json: bool) -> None:
    from orchestrator.report import format_bytes

    uploads = [upload.key for upload in found.uploads]
    if as_json:
        print(json.dumps({"deleted": found.deleted, "due": found.due, "waiting": found.waiting, "uploads": uploads}, indent=1))
        return
    for key, size in found.due.items():
        out.print(f"  {format_bytes(size):>10}  {plain(key)}", soft_wrap=True)
    for key in uploads:
        out.print(f"  unfinished upload of {plain(key)}", soft_wrap=True)
    nothing = not found.due and not uploads
    verb = "deleted" if found.deleted else "to delete" if nothing else "to delete (run again with --delete)"
    out.print(f"{len(found.due)} objects, {format_bytes(sum(found.due.values()))}, and {len(uploads)} unfinished uploads {verb}")
    if found.waiting:
        total = format_bytes(sum(found.waiting.values()))
        out.print(
            f"{len(found.waiting)} more, {total}, are unneeded, but have not been so for {grace_days:g} days since a first look"
        )


def _address(url: str) -> str:
    from orchestrator.loading import resolve_store

    return resolve_store(url, Path.cwd())


def _store(store: str | None, cluster: Path | None) -> str:
    """The store's URL. Raises SpecError when neither is given."""
    from orchestrator.loading import load_cluster

    if store is not None:
        return _address(store)
    if cluster is None:
        raise SpecError("neither a store nor --cluster was given", "Give the store's URL or folder.")
    return load_cluster(cluster).store


def _options(cluster: Path | None) -> StoreOptions | None:
    from orchestrator.loading import load_cluster

    return load_cluster(cluster).store_options if cluster is not None else None


def _pair(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not given:
        raise SpecError(f"--select {text!r} is not NAME=VALUE", "E.g. --select tp=2.")
    return name, value
