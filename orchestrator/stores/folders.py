"""List everything below a folder, local or of an fsspec file system, or raise an error.

os.walk, Path.rglob and fsspec's find skip what they cannot read. For `collect`, an unlisted object does not exist: a manifest in an
unreadable folder would release everything that its release needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder`; empty for a missing folder. Links to folders are followed, as when a key is read.

    Raises OSError for any folder below that cannot be listed, vanishes meanwhile, or leads back to a parent.
    """
    try:
        top = folder.stat()
    except FileNotFoundError:
        return
    yield from _below(folder, ((top.st_dev, top.st_ino),))


def _below(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if not entry.is_dir():
                yield path
                continue
            found = entry.stat()
            here = (found.st_dev, found.st_ino)
            if here in above:
                raise OSError(f"{path} leads back to a folder above it")
            yield from _below(path, (*above, here))


def find_files(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """Return every file below `root` of an fsspec file system, by path; empty for a missing root.

    Raises the errors of requests, and OSError for a folder below that cannot be listed.
    """
    if _lists_at_once(fs):
        try:
            found: dict[str, dict[str, Any]] = fs.find(root, detail=True)
        except FileNotFoundError:
            return {}
        return found
    try:
        entries = fs.ls(root, detail=True)
    except FileNotFoundError:
        return {}
    return dict(_walk(fs, root, entries))


def _walk(fs: Any, folder: str, entries: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in entries:
        name = str(entry["name"]).rstrip("/")
        if entry["type"] != "directory":
            yield entry["name"], entry
        elif name != folder.rstrip("/"):
            yield from _walk(fs, name, fs.ls(name, detail=True))


def _lists_at_once(fs: Any) -> bool:
    """Whether the file system has its own listing, as object stores do; fsspec's own skips folders that cannot be listed."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find or "find" in vars(type(fs))
    return type(fs).find is not AbstractFileSystem.find
