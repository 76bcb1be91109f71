"""Bring a release, or a node's part of it, to a folder of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.core.errors import DigestError, ReleaseMissingError, SpecError, store_error
from orchestrator.core.manifest import FileRecord, Manifest
from orchestrator.core.spec import StoreOptions
from orchestrator.layouts import Arrangement, Request, arrange
from orchestrator.releases.downloading import Wanted, download, sync_folder, write_whole
from orchestrator.releases.machine import check_machine, this_machine
from orchestrator.releases.reading import Release, open_release


def _silent(_file: FileRecord) -> None:
    pass


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
    progress: Callable[[FileRecord], None] = _silent,
) -> list[Path]:
    """Fetch what some ranks need from the release or tag at `url` to the folder `output`; returns the files of the release.

    `ranks`, or the ranks `node` * `gpus_per_node` and following, or all. Every byte is verified before a file gets its name; files
    that are right already are kept, and a broken pull goes on where it was. With `public_key` (PEM) the release must be signed
    with that key; with `check` this machine must be able to run the ranks. `layout` is a name of orchestrator/layouts.

    Raises ReleaseMissingError, SchemaVersionError, DigestError, SignatureError, MachineError, SpecError, StoreError.
    """
    release = open_release(url, public_key, options)
    wanted = wanted_ranks(release.manifest, ranks, node, gpus_per_node)
    files = release.files_of(set(wanted))
    request = Request(release.manifest, tuple(wanted), tuple(files), release.data, release.signature())
    arrangement = arrange(layout, request)
    if check:
        check_machine(release.manifest, wanted, this_machine())
    return _bring(release, files, arrangement, output, progress)


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


def _bring(
    release: Release, files: list[FileRecord], arrangement: Arrangement, output: Path, progress: Callable[[FileRecord], None]
) -> list[Path]:
    """Download to the places of the arrangement, then write its own files, then give folders their final names."""
    staged = {final: temporary for temporary, final in arrangement.renames if not (output / final).exists()}
    targets = {
        file.path: _place(output, arrangement.places[file.path], staged) for file in files if file.path in arrangement.places
    }
    by_path = {file.path: file for file in files}
    download(release.store, [Wanted(by_path[path], target) for path, target in targets.items()], progress)
    for path, data in arrangement.written.items():
        write_whole(_place(output, path, staged), data)
    for final, temporary in staged.items():
        try:
            (output / temporary).rename(output / final)
            sync_folder((output / final).parent)
        except OSError as error:
            raise store_error(f"cannot rename {output / temporary} to {final}", error) from error
    return [_place(output, arrangement.places[path], {}) for path in targets]


def _place(output: Path, path: str, staged: dict[str, str]) -> Path:
    """Where a file goes; below `output`, whatever a manifest says. Raises DigestError."""
    for final, temporary in staged.items():
        if path.startswith(final + "/"):
            path = temporary + path[len(final) :]
    target = output / path
    if Path(path).is_absolute() or ".." in Path(path).parts or not target.resolve().is_relative_to(output.resolve()):
        raise DigestError(f"the manifest names a file outside of the release: {path}")
    return target
