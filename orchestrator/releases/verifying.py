"""Read every byte of a release again and compare it with the manifest, and the manifest with its signature."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.digest import ChunkHasher
from orchestrator.base.errors import DigestError
from orchestrator.releases.manifest import MANIFEST, SIGNATURE, FileRecord
from orchestrator.releases.reading import Release, open_release
from orchestrator.releases.transfers import Listener, Silent
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores.store import ObjectMissingError, Store

_FILES_IN_FLIGHT = 4
_SHOWN = 20
"""Damaged files that an error names."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Result of a verification."""

    release: Release
    num_files: int
    num_bytes: int
    is_signed: bool
    """True: the manifest has a signature. Its key is checked only if a public key was given."""


def verify(
    url: str, public_key: Path | None = None, options: StoreOptions | None = None, listener: Listener | None = None
) -> Verified:
    """Check the release or tag at `url`: the manifest, its signature if `public_key` is given, every file and every chunk.

    A folder to which whole parts of a release were pulled, flat, is checked the same way, and must hold no other files. Raises
    DigestError that names damaged files, and as `open_release`.
    """
    return check_files(open_release(url, public_key, options), listener)


def check_files(release: Release, listener: Listener | None = None) -> Verified:
    """Do what `verify` does for a release that is already open, with its signature checked."""
    listener = listener or Silent()
    # By their records, not by their keys: two records of one object may state different digests.
    files = list(dict.fromkeys(_expected(release)))
    listener.on_begin(len(files), sum(file.num_bytes for file in files))
    with ThreadPoolExecutor(_FILES_IN_FLIGHT) as pool:
        problems = pool.map(lambda file: _problem(release.store, file, listener), files)
        damaged = [f"{file.path} {problem}" for file, problem in zip(files, problems, strict=True) if problem]
    damaged += [f"{name} is not one of its files" for name in _strangers(release)]
    if damaged:
        more = f"; and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        raise DigestError(f"{release.title} at {release.store.url} is damaged: " + "; ".join(damaged[:_SHOWN]) + more)
    return Verified(release, len(files), sum(file.num_bytes for file in files), release.signature() is not None)


def _expected(release: Release) -> list[FileRecord]:
    """Return the files that must be there: all, but of a pulled folder only the parts of which it has a file."""
    manifest = release.manifest
    ranks = {record.rank for record in manifest.ranks}
    if not _is_pulled(release):
        return manifest.all_files()
    common = manifest.files_of(ranks, ())
    pulled = [
        part
        for part in manifest.parts
        if any(release.store.size(file.path) is not None for file in manifest.files_of(ranks, (part,)) if file not in common)
    ]
    return manifest.files_of(ranks, pulled)


def _is_pulled(release: Release) -> bool:
    """Whether the release is a folder to which it was pulled: its files lie under their paths, not their keys."""
    return not any(release.store.size(file.key) is not None for file in release.manifest.all_files() if file.key != file.path)


def _strangers(release: Release) -> list[str]:
    """Return the files of a pulled folder that the manifest does not name: a program that loads the folder would load them too.

    A release in a store has none: its objects are found by the manifest alone.
    """
    files = release.manifest.all_files()
    if not files or not _is_pulled(release):
        return []
    known = {MANIFEST, SIGNATURE, *(file.path for file in files)}
    return sorted(info.key for info in release.store.list("") if info.key not in known)


def _problem(store: Store, file: FileRecord, listener: Listener) -> str:
    """Return the problem of a file; empty when it is right."""
    whole, chunks, size = hashlib.sha256(), ChunkHasher(file.chunks.num_bytes), 0
    try:
        for block in store.blocks(file.key if store.size(file.key) is not None else file.path):
            whole.update(block)
            chunks.update(block)
            size += len(block)
            listener.on_bytes(len(block))
            if size > file.num_bytes:
                break
    except ObjectMissingError:
        return "is missing"
    finally:
        listener.on_file(file)
    if size != file.num_bytes:
        found = f"more than {file.num_bytes:,} bytes" if size > file.num_bytes else f"{size:,} bytes"
        return f"has {found}, published were {file.num_bytes:,}"
    if whole.hexdigest() != file.sha256:
        return f"has sha256 {whole.hexdigest()}, published was {file.sha256}"
    return "" if chunks.digests() == file.chunks.sha256 else "has other chunks than its manifest lists"
