"""Read every byte of a release again and compare it with the manifest, and the manifest with its signature."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.digest import ChunkHasher
from orchestrator.core.errors import DigestError
from orchestrator.core.manifest import FileRecord
from orchestrator.core.spec import StoreOptions
from orchestrator.releases.reading import Release, open_release
from orchestrator.stores import ObjectMissingError, Store

_FILES_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to be right."""

    release: Release
    num_files: int
    num_bytes: int
    is_signed: bool
    """There is a signature for this manifest; whose it is was checked only where a public key was given."""


def verify(
    url: str,
    public_key: Path | None = None,
    options: StoreOptions | None = None,
    progress: Callable[[FileRecord], None] = lambda file: None,
) -> Verified:
    """Check the release or tag at `url`: the manifest, its signature where `public_key` is given, every file and every chunk.

    A folder that a whole release was pulled to, flat, is checked the same way. Raises DigestError that names every damaged file,
    and as `open_release`.
    """
    release = open_release(url, public_key, options)
    files = list({file.key: file for file in release.manifest.all_files()}.values())
    damaged = []
    with ThreadPoolExecutor(_FILES_IN_FLIGHT) as pool:
        for file, problem in zip(files, pool.map(lambda file: _problem(release.store, file), files), strict=True):
            if problem:
                damaged.append(f"{file.path} {problem}")
            progress(file)
    if damaged:
        raise DigestError(f"{release.title} at {release.store.url} is damaged: " + "; ".join(damaged))
    return Verified(release, len(files), sum(file.num_bytes for file in files), release.signature() is not None)


def _problem(store: Store, file: FileRecord) -> str:
    """What is wrong with a file; empty when nothing is."""
    whole, chunks, size = hashlib.sha256(), ChunkHasher(file.chunks.num_bytes), 0
    try:
        for block in store.blocks(file.key if store.size(file.key) is not None else file.path):
            whole.update(block)
            chunks.update(block)
            size += len(block)
    except ObjectMissingError:
        return "is not there"
    if size != file.num_bytes:
        return f"has {size:,} bytes, published were {file.num_bytes:,}"
    if whole.hexdigest() != file.sha256:
        return f"has sha256 {whole.hexdigest()}, published was {file.sha256}"
    return "" if chunks.digests() == file.chunks.sha256 else "has other chunks than its manifest says"
