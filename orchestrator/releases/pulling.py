"""Download a release, or a node's part of it, to a local folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from orchestrator.base.errors import DigestError, ReleaseMissingError, SpecError
from orchestrator.base.paths import check_disjoint, check_path
from orchestrator.releases.downloading import Wanted, download
from orchestrator.releases.folders import OutputFolder
from orchestrator.releases.layouts import Arrangement, Request, arrange, parts_of
from orchestrator.releases.machine import check_machine, this_machine
from orchestrator.releases.manifest import FileRecord, Manifest, Part
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
    parts: Collection[Part] | None = None,
    public_key: Path | None = None,
    check: bool = True,
    options: StoreOptions | None = None,
    listener: Listener | None = None,
) -> list[Path]:
    """Download the files that some ranks need from the release or tag at `url` to the folder `output`; returns their paths.

    Ranks: `ranks`, or `gpus_per_node` ranks from `node` * `gpus_per_node` on, or all. Every byte is verified before a file gets its
    name. Files that are already right are kept, and a broken pull resumes. With `public_key` (PEM) the release must be signed with
    that key; with `check` this machine must be able to run the engines. `layout`: a name of orchestrator/releases/layouts. `parts`:
    None for those of the layout, which are the engines except for `genai` and `checkpoint`.

    Raises ReleaseMissingError, SchemaVersionError, DigestError, SignatureError, MachineError, SpecError, StoreError.
    """
    release = open_release(url, public_key, options)
    return fetch(
        release,
        output,
        ranks=ranks,
        node=node,
        gpus_per_node=gpus_per_node,
        layout=layout,
        parts=parts,
        check=check,
        listener=listener,
    )


def fetch(
    release: Release,
    output: Path,
    *,
    ranks: Iterable[int] | None = None,
    node: int | None = None,
    gpus_per_node: int = 8,
    layout: str = "flat",
    parts: Collection[Part] | None = None,
    check: bool = True,
    listener: Listener | None = None,
) -> list[Path]:
    """Do what `pull` does for a release that is already open, with its signature checked."""
    wanted = wanted_ranks(release.manifest, ranks, node, gpus_per_node)
    chosen = parts_of(layout, parts)
    files = release.files_of(set(wanted), chosen)
    request = Request(release.manifest, tuple(wanted), tuple(files), release.data, release.signature())
    arrangement = arrange(layout, request)
    if check and "engines" in chosen:
        check_machine(release.manifest, wanted, this_machine())
    return _bring(release, files, arrangement, output, listener or Silent())


def wanted_ranks(manifest: Manifest, ranks: Iterable[int] | None, node: int | None, gpus_per_node: int) -> list[int]:
    """Return the ranks to fetch, ascending. Raises SpecError for both `ranks` and `node`, ReleaseMissingError for missing ranks."""
    present = sorted(record.rank for record in manifest.ranks)
    if ranks is not None and node is not None:
        raise SpecError("both ranks and a node were given", "Give --rank or --node.")
    if gpus_per_node < 1:
        raise SpecError(f"a node cannot have {gpus_per_node} GPUs", "Give --gpus-per-node 8, or the number of GPUs of a node.")
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
    """Download files to the arrangement's paths, then write its own files, then rename folders."""
    _check_targets(arrangement)
    wanted = [file for file in files if file.path in arrangement.paths]
    with OutputFolder(folder) as output:
        staged = {final: temporary for temporary, final in arrangement.renames if output.spot(final).stat() is None}
        targets = {file.path: _staged(arrangement.paths[file.path], staged) for file in wanted}
        download(release.store, [Wanted(file, targets[file.path]) for file in wanted], output, listener)
        output.sync()  # the names of files are written once the files are safely on disk
        for path, data in arrangement.written.items():
            output.write_whole(_staged(path, staged), data)
        for path, name in arrangement.links.items():
            output.link(_staged(path, staged), name)
        output.sync()
        for final, temporary in staged.items():
            output.rename_folder(temporary, final)
        output.sync()
    for note in arrangement.notes:
        listener.on_note(note)
    return [folder / arrangement.paths[file.path] for file in wanted]


def _check_targets(arrangement: Arrangement) -> None:
    """Check that the layout writes inside the folder and each file once, whatever the manifest says. Raises DigestError."""
    targets = list({*arrangement.paths.values(), *arrangement.written, *arrangement.links})
    try:
        for path in targets:
            check_path(path)
        check_disjoint(targets)
    except ValueError as error:
        raise DigestError(f"the release cannot be laid out: {error}") from None
    overwritten = set(arrangement.paths.values()) & (arrangement.written.keys() | arrangement.links.keys())
    if overwritten:
        raise DigestError(f"the release cannot be laid out: {min(overwritten)} is also a file of the layout")


def _staged(path: str, staged: dict[str, str]) -> str:
    """Return the path until the folder gets its final name."""
    for final, temporary in staged.items():
        if path.startswith(final + "/"):
            return temporary + path[len(final) :]
    return path
