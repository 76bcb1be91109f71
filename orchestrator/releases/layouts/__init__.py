"""Layouts of a pulled release in a folder: the request, the arrangement, and the table of layouts.

A layout decides the path of each file and the files written beside them. It sees the manifest and no bytes of engines.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.base.errors import SpecError
from orchestrator.releases.manifest import MANIFEST, PARTS, SIGNATURE, FileRecord, Manifest, Part, RankRecord

LAYOUTS: dict[str, str] = {
    "checkpoint": "orchestrator.releases.layouts.checkpoint",
    "flat": "orchestrator.releases.layouts.flat",
    "genai": "orchestrator.releases.layouts.genai",
    "oci": "orchestrator.releases.layouts.oci",
    "triton": "orchestrator.releases.layouts.triton",
    "trtllm": "orchestrator.releases.layouts.trtllm",
}


_ONE_PART: dict[str, tuple[Part, ...]] = {"checkpoint": ("checkpoint",), "genai": ("portable",)}
"""Layouts that hold another part than the engines."""


def parts_of(layout: str, asked: Collection[Part] | None) -> tuple[Part, ...]:
    """Return the parts to lay out: those asked for, else the layout's own. Raises SpecError for parts that it cannot hold."""
    own = _ONE_PART.get(layout, ("engines",))
    if asked is None or set(asked) == set(own):
        return own
    if layout not in ("flat", "oci"):
        raise SpecError(f"layout {layout} holds the part {own[0]} only", "For other parts, use --layout flat.")
    return tuple(part for part in PARTS if part in asked)


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
