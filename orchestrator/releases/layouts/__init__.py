"""Layouts: how a pulled release lies in a folder, for whom. The request, the answer, and the table of layouts.

A layout says where each file of the release goes and what stands beside it. It sees the manifest and no bytes of engines.
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
    """What is going to be laid out."""

    manifest: Manifest
    ranks: tuple[int, ...]
    """Ascending."""
    files: tuple[FileRecord, ...]
    """What these ranks need."""
    data: bytes
    """manifest.json as it is stored and signed."""
    signature: bytes | None

    def records(self) -> list[RankRecord]:
        return [self.manifest.rank(rank) for rank in self.ranks]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where everything goes, relative to the output folder."""

    paths: Mapping[str, str]
    """Path of a file of the release to its place; files that are left out are not fetched."""
    written: Mapping[str, bytes]
    """What stands beside them, written in this order when all of them are there."""
    renames: tuple[tuple[str, str], ...] = field(default=())
    """Folders that get their name at the very end: (while it is filled, final)."""


class Layout(Protocol):
    """What a member of LAYOUTS offers."""

    def arrange(self, request: Request) -> Arrangement:
        """Say where everything goes. Raises SpecError for a release that the layout cannot hold."""
        ...


def arrange(name: str, request: Request) -> Arrangement:
    """The arrangement of the layout called `name`. Raises SpecError."""
    if name not in LAYOUTS:
        raise SpecError(f"there is no layout {name!r}", f"Layouts: {', '.join(LAYOUTS)}.")
    module: Layout = importlib.import_module(LAYOUTS[name])
    return module.arrange(request)


def identity_files(request: Request) -> dict[str, bytes]:
    """The manifest and its signature, by the names under which model_signing's own command line looks for them."""
    signature = {SIGNATURE: request.signature} if request.signature is not None else {}
    return {MANIFEST: request.data, **signature}
