"""Checks of the file paths in a manifest: relative, below the release's folder on every system, no two the same file."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_PATH_BYTES = 1024
_NAME_BYTES = 200
"""Longest file name. File systems allow 255 bytes, and the name of a file that is being fetched is 24 longer."""


def check_path(path: str) -> None:
    """Check that the relative `path` names a file below its folder. Raises ValueError otherwise."""
    if len(path) > _PATH_BYTES or len(path.encode()) > _PATH_BYTES:
        raise ValueError(f"a path of {len(path):,} characters is too long: {path[:40]!r}...")
    names = path.split("/")
    if "" in names or "." in names or ".." in names:
        raise ValueError(f"{path!r} is not the path of a file in the release")
    if "\\" in path or any(unicodedata.category(character) in ("Cc", "Cs") for character in path):
        raise ValueError(f"{path!r} is a path with a backslash or control characters")
    longest = max(names, key=lambda name: len(name.encode()))
    if len(longest.encode()) > _NAME_BYTES:
        raise ValueError(f"{longest[:40]!r}... is a name of {len(longest.encode()):,} bytes in a path")
    if any(name.startswith(".") and name.endswith(".part") for name in names):
        raise ValueError(f"{path!r} is the name of a file that is being fetched")


def check_disjoint(paths: Iterable[str]) -> None:
    """Check that no two paths are the same file on some file system, or one the folder of another. Raises ValueError."""
    known: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        names = _same(path).split("/")
        for path_of in (known, folders):
            other = path_of.get("/".join(names))
            if other is not None:
                raise ValueError(f"{other!r} and {path!r} cannot stand in one folder")
        known["/".join(names)] = path
        for count in range(1, len(names)):
            folder = "/".join(names[:count])
            if folder in known:
                raise ValueError(f"{known[folder]!r} and {path!r} cannot stand in one folder")
            folders.setdefault(folder, path)


def _same(path: str) -> str:
    """Return the path as file systems compare it that ignore case or Unicode normalization."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
