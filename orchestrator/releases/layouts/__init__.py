"""Layouts of a pulled release in a folder: the request, the arrangement, and the table of layouts.

A layout decides the path of each file and the files written beside them. It sees the manifest and no bytes of engines.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.base.errors import SpecError
from orchestrator.releases.manifest import MANIFEST, SIGNATURE, FileRecord, Manifest, RankRecord

LAYOUTS: dict[str, str] = {
    "flat": "orchestrator.releases.layouts.flat",
    "oci": "orchestrator.releases.layouts.oci",
    "triton": "orchestrator.releases.layouts.triton",
    "trtllm": "orchestrator.releases.layouts.trtllm",
}


@dataclass(frozen=True, slots=True)
class Request:
    """Release and ranks to lay out."""

    manifest: Manifest
    ranks: tuple[int, ...]
    """Ranks in ascending order."""
    files: tuple[FileRecord, ...]
    """Files that these ranks need."""
    data: bytes
    """Bytes of manifest.json as stored and signed."""
    signature: bytes | None

    def records(self) -> list[RankRecord]:
        return [self.manifest.rank(rank) for rank in self.ranks]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Paths of all files, relative to the output folder."""

    paths: Mapping[str, str]
    """Target path by path in the release. Files left out are not fetched."""
    written: Mapping[str, bytes]
    """Content of additional files by path, written in this order once all fetched files are in place."""
    renames: tuple[tuple[str, str], ...] = field(default=())
    """Folders to rename at the very end: (name while it is filled, final name)."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Symbolic links by path, each to a name in its own folder."""
    notes: tuple[str, ...] = field(default=())
    """Limits of what was laid out, for whoever asked for it."""


class Layout(Protocol):
    """Protocol of the members of LAYOUTS."""

    def arrange(self, request: Request) -> Arrangement:
        """Return the arrangement. Raises SpecError for a release that the layout cannot hold."""
        ...


def arrange(name: str, request: Request) -> Arrangement:
    """Return the arrangement of the layout `name`. Raises SpecError."""
    if name not in LAYOUTS:
        raise SpecError(f"there is no layout {name!r}", f"Layouts: {', '.join(LAYOUTS)}.")
    module: Layout = importlib.import_module(LAYOUTS[name])
    return module.arrange(request)


def identity_files(request: Request) -> dict[str, bytes]:
    """Return the manifest and its signature, by the names that model_signing's command line expects."""
    signature = {SIGNATURE: request.signature} if request.signature is not None else {}
    return {MANIFEST: request.data, **signature}
