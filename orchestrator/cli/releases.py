"""Commands for consumers of releases: pull, verify, releases, tag, collect."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.base.errors import SpecError
from orchestrator.cli.console import Json, PublicKey, Ranks, exit_codes, out, parse_ranks, plain, show
from orchestrator.spec.cluster import StoreOptions

if TYPE_CHECKING:
    from orchestrator.releases import Collected, Listed, Release

app = typer.Typer()
_MOST_DAYS = 36_500

Url = Annotated[str, typer.Argument(metavar="URL", help="URL of a release, <store>/releases/<name>/<version>, or of a tag.")]
Options = Annotated[
    Path | None,
    typer.Option("--cluster", help="Cluster file with the store and its connection."),
]


@app.command()
def pull(
    url: Url,
    rank: Ranks = "all",
    node: Annotated[int | None, typer.Option("--node", min=0, help="Number of a node, to pull its ranks.")] = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs, and so ranks, of a node.")] = 8,
    output: Annotated[Path, typer.Option("--output", help="Folder to write to.")] = Path("engines"),
    layout: Annotated[str, typer.Option("--layout", help="flat, trtllm, triton, oci, genai or checkpoint.")] = "flat",
    part: Annotated[
        list[str] | None, typer.Option("--part", help="engines, portable or checkpoint; repeatable. Absent: what the layout holds.")
    ] = None,
    public_key: PublicKey = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Check that this machine can run the engines.")] = True,
    cluster: Options = None,
) -> None:
    """Download the files of a rank, a node or all ranks, and check every byte. After an interruption, run it again: it resumes."""
    with exit_codes():
        from orchestrator import releases
        from orchestrator.report import TransferView

        ranks = parse_ranks(rank)
        release = releases.open_release(resolved(url), public_key, options_of(cluster))
        _print_identity(release, public_key)
        with TransferView(out, names=True) as view:
            paths = releases.fetch(
                release,
                output,
                ranks=ranks,
                node=node,
                gpus_per_node=gpus_per_node,
                layout=layout,
                parts=releases.parse_parts(part),
                check=check,
                listener=view,
            )
        out.print(f"{len(paths)} files in {plain(str(output))}, every length and digest right", soft_wrap=True)


@app.command()
def verify(url: Url, public_key: PublicKey = None, cluster: Options = None, as_json: Json = False) -> None:
    """Read a whole release again and check every digest; with --public-key, the signature too."""
    with exit_codes(as_json):
        from orchestrator import releases
        from orchestrator.report import TransferView, format_bytes

        release = releases.open_release(resolved(url), public_key, options_of(cluster))
        if as_json:
            found = releases.check_files(release)
            manifest = release.manifest
            facts = {
                "name": manifest.name, "version": manifest.version, "manifest": release.digest, "files": found.num_files,
                "bytes": found.num_bytes, "signature": _signature(release, public_key), "signer": release.signer,
                "tag": release.tag.name if release.tag else None,
            }  # fmt: skip
            print(json.dumps(facts))
            return
        _print_identity(release, public_key)
        with TransferView(out) as view:
            found = releases.check_files(release, view)
        out.print(f"{found.num_files} files, {format_bytes(found.num_bytes)}, every length and digest right")


def _print_identity(release: Release, public_key: Path | None) -> None:
    """Print which release it is and who signed it: the address alone shows neither."""
    if release.tag is not None:
        found = release.tag
        out.print(f"tag {found.name} (version {found.number}) is {found.release}", soft_wrap=True)
    out.print(f"{release.title}, manifest sha256:{release.digest}", soft_wrap=True)
    out.print(plain(_signature(release, public_key)), soft_wrap=True)


def _signature(release: Release, public_key: Path | None) -> str:
    if release.signer:
        return f"signed by the key {release.signer} ({public_key})"
    return "not signed" if release.signature() is None else "signed, but the key was not checked (--public-key)"


@app.command("releases")
def list_(
    store: Annotated[str | None, typer.Argument(metavar="[STORE]", help="URL or folder; absent: the cluster file's.")] = None,
    cluster: Options = None,
    select: Annotated[
        list[str] | None,
        typer.Option("--select", metavar="NAME=VALUE", help="NAME is backend, precision, tp, pp or gpu; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the releases of a store."""
    with exit_codes(as_json):
        from orchestrator import releases

        selectors = dict(_pair(text) for text in select or [])
        found = releases.list_releases(_store(store, cluster), selectors, options_of(cluster))
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
        out.print("No release found. Without --select, all releases are listed.")


@app.command()
def tag(
    url: Url,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the tag, e.g. prod or llama/prod.")],
    sign_key: Annotated[
        Path | None, typer.Option("--sign-key", help="Private key (PEM, P-256) to sign the tag with; `pull --public-key` needs it.")
    ] = None,
    cluster: Options = None,
) -> None:
    """Set a tag to a release; `pull STORE/tags/NAME` follows it."""
    with exit_codes():
        from orchestrator import releases

        made = releases.tag(resolved(url), name, options_of(cluster), sign_key=sign_key)
        signed = ", signed" if made.signature else ""
        out.print(
            f"{made.name} (version {made.number}) is {made.release}, manifest {made.manifest_sha256[:16]}{signed}", soft_wrap=True
        )


@app.command()
def collect(
    store: Annotated[str | None, typer.Argument(metavar="[STORE]", help="URL or folder; absent: the cluster file's.")] = None,
    grace_days: Annotated[
        float,
        typer.Option("--grace-days", min=0, help="Keep objects unneeded for less; must exceed the longest build."),
    ] = 7.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the objects found; without it, only list them.")] = False,
    cluster: Options = None,
    as_json: Json = False,
) -> None:
    """Find objects that no release and no running build needs, and delete them with --delete."""
    with exit_codes(as_json):
        from orchestrator import releases

        if not 0 <= grace_days <= _MOST_DAYS:
            raise SpecError(f"--grace-days {grace_days:g}", f"Give a number of days from 0 to {_MOST_DAYS:,}.")
        grace = datetime.timedelta(days=grace_days)
        found = releases.collect(_store(store, cluster), grace, delete=delete, options=options_of(cluster))
        _show_collected(found, grace_days, as_json)


def _show_collected(found: Collected, grace_days: float, as_json: bool) -> None:
    from orchestrator.report import format_bytes

    uploads = [upload.key for upload in found.uploads]
    if as_json:
        lists = {"due": found.due, "waiting": found.waiting, "uploads": uploads, "unreadable": found.unreadable}
        print(json.dumps({"deleted": found.deleted, **lists}, indent=1))
        return
    for key in found.unreadable:
        out.print(f"[yellow]warning:[/] {plain(key)} cannot be understood; while it exists, no step's outputs are removed")
    for key, size in found.due.items():
        out.print(f"  {format_bytes(size):>10}  {plain(key)}", soft_wrap=True)
    for key in uploads:
        out.print(f"  unfinished upload of {plain(key)}", soft_wrap=True)
    nothing = not found.due and not uploads
    verb = "deleted" if found.deleted else "to delete" if nothing else "to delete (run again with --delete)"
    out.print(f"{len(found.due)} objects, {format_bytes(sum(found.due.values()))}, and {len(uploads)} unfinished uploads {verb}")
    if found.waiting:
        total = format_bytes(sum(found.waiting.values()))
        out.print(f"{len(found.waiting)} more, {total}, are unneeded, but for less than {grace_days:g} days since first seen")


def resolved(url: str) -> str:
    """Return an address as a URL: a folder counts from the working folder."""
    from orchestrator.spec.loading import resolve_store

    return resolve_store(url, Path.cwd())


def _store(store: str | None, cluster: Path | None) -> str:
    """Return the store's URL. Raises SpecError when neither option gives it."""
    from orchestrator.spec.loading import load_cluster

    if store is not None:
        return resolved(store)
    if cluster is None:
        raise SpecError("neither a store nor --cluster was given", "Give the store's URL or folder.")
    return load_cluster(cluster).store


def options_of(cluster: Path | None) -> StoreOptions | None:
    """Return the connection to the store that a cluster file gives; None without one."""
    from orchestrator.spec.loading import load_cluster

    return load_cluster(cluster).store_options if cluster is not None else None


def _pair(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not given:
        raise SpecError(f"--select {text!r} is not NAME=VALUE", "E.g. --select tp=2.")
    return name, value
