"""Bring a release, or a node's part of it, to a folder of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from orchestrator.base.errors import DigestError, ReleaseMissingError, SpecError
from orchestrator.base.paths import check_disjoint, check_path
from orchestrator.releases.downloading import Wanted, download
from orchestrator.releases.folders import OutputFolder
from orchestrator.releases.layouts import Arrangement, Request, arrange
from orchestrator.releases.machine import check_machine, this_machine
from orchestrator.releases.manifest import FileRecord, Manifest
from orchestrator.releases.reading import Release, open_release
from orchestrator.releases.transfers import Listener, Silent
from orchestrator.spec.cluster import StoreOptions


def pull(
    url: str,
    output: Path,
    *,
    ranks: Iterable[int] | None = None,
    node: int | None = None,
    gpus_per_node: int = 8,
    layout: str = "flat",
    public_key: Path | None = None,
    check: bool = True,
    options: StoreOptions | None = None,
    listener: Listener | None = None,
) -> list[Path]:
    """Fetch what some ranks need from the release or tag at `url` to the folder `output`; returns the files of the release.

    `ranks`, or the ranks `node` * `gpus_per_node` and following, or all. Every byte is verified before a file gets its name; files
    that are right already are kept, and a broken pull goes on where it was. With `public_key` (PEM) the release must be signed
    with that key; with `check` this machine must be able to run the ranks. `layout` is a name of orchestrator/releases/layouts.

    Raises ReleaseMissingError, SchemaVersionError, DigestError, SignatureError, MachineError, SpecError, StoreError.
    """
    release = open_release(url, public_key, options)
    return fetch(
        release, output, ranks=ranks, node=node, gpus_per_node=gpus_per_node, layout=layout, check=check, listener=listener
    )


def fetch(
    release: Release,
    output: Path,
    *,
    ranks: Iterable[int] | None = None,
    node: int | None = None,
    gpus_per_node: int = 8,
    layout: str = "flat",
    check: bool = True,
    listener: Listener | None = None,
) -> list[Path]:
    """As `pull`, of a release that was opened, and its signature checked, before."""
    wanted = wanted_ranks(release.manifest, ranks, node, gpus_per_node)
    files = release.files_of(set(wanted))
    request = Request(release.manifest, tuple(wanted), tuple(files), release.data, release.signature())
    arrangement = arrange(layout, request)
    if check:
        check_machine(release.manifest, wanted, this_machine())
    return _bring(release, files, arrangement, output, listener or Silent())


def wanted_ranks(manifest: Manifest, ranks: Iterable[int] | None, node: int | None, gpus_per_node: int) -> list[int]:
    """The ranks to fetch, ascending. Raises SpecError for `ranks` and `node` at once, ReleaseMissingError for what is not there."""
    present = sorted(record.rank for record in manifest.ranks)
    if ranks is not None and node is not None:
        raise SpecError("both ranks and a node were given", "Give --rank or --node.")
    if gpus_per_node < 1:
        raise SpecError(f"{gpus_per_node} GPUs per node are none", "Give --gpus-per-node 8, or as many as a node has.")
    if node is not None:
        found = [rank for rank in present if rank // gpus_per_node == node]
        if not found:
            raise ReleaseMissingError(
                f"{manifest.name} {manifest.version} has nothing for node {node} of {gpus_per_node} GPUs",
                f"Its {len(present)} ranks are on {_nodes((len(present) - 1) // gpus_per_node)}.",
            )
        return found
    wanted = sorted(set(present if ranks is None else ranks))
    unknown = [rank for rank in wanted if rank not in present]
    if unknown:
        raise ReleaseMissingError(
            f"{manifest.name} {manifest.version} has no rank {unknown[0]}", f"It has ranks 0 to {len(present) - 1}."
        )
    return wanted


def _nodes(last: int) -> str:
    return f"nodes 0 to {last}" if last else "node 0 alone"


def _bring(release: Release, files: list[FileRecord], arrangement: Arrangement, folder: Path, listener: Listener) -> list[Path]:
    """Download to the places of the arrangement, then write its own files, then give folders their final names."""
    _check_targets(arrangement)
    wanted = [file for file in files if file.path in arrangement.paths]
    with OutputFolder(folder) as output:
        staged = {final: temporary for temporary, final in arrangement.renames if output.spot(final).stat() is None}
        targets = {file.path: _staged(arrangement.paths[file.path], staged) for file in wanted}
        download(release.store, [Wanted(file, targets[file.path]) for file in wanted], output, listener)
        output.sync()  # what names the files is written when they are there to stay
        for path, data in arrangement.written.items():
            output.write_whole(_staged(path, staged), data)
        output.sync()
        for final, temporary in staged.items():
            output.rename_folder(temporary, final)
        output.sync()
    return [folder / arrangement.paths[file.path] for file in wanted]


def _check_targets(arrangement: Arrangement) -> None:
    """Raises DigestError when the layout would write outside of the folder, or one file over another, whatever a manifest says."""
    targets = list({*arrangement.paths.values(), *arrangement.written})
    try:
        for path in targets:
            check_path(path)
        check_disjoint(targets)
    except ValueError as error:
        raise DigestError(f"the release cannot be laid out: {error}") from None
    overwritten = set(arrangement.paths.values()) & arrangement.written.keys()
    if overwritten:
        raise DigestError(f"the release cannot be laid out: {min(overwritten)} is a file of the layout too")


def _staged(path: str, staged: dict[str, str]) -> str:
    """Where it stands until its folder gets its final name."""
    for final, temporary in staged.items():
        if path.startswith(final + "/"):
            return temporary + path[len(final) :]
    return path
