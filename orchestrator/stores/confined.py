"""Read files of a source that are published with a release: only from within the source, because others will read them."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.base.errors import SourceLinkError, SourceMissingError
from orchestrator.stores.source import LocalFolder, SourceFolder

_SNAPSHOTS = "snapshots"


def read_companion(folder: SourceFolder, name: str) -> bytes:
    """Read a tokenizer or config file. Raises SourceLinkError for a link out of the source, and as `SourceFolder.read`."""
    if isinstance(folder, LocalFolder):
        _check_within(folder.folder, name)
    return folder.read(name)


def _check_within(folder: Path, name: str) -> None:
    """Check that a file lies within the source. Raises SourceLinkError, SourceMissingError."""
    try:
        root, target = folder.resolve(), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceMissingError(f"cannot read {folder / name}: {reason}") from None
    allowed = [root, *_hub_repository(root)]
    if not any(target.is_relative_to(place) for place in allowed):
        raise SourceLinkError(
            f"{folder / name} is a link out of the source, to {os.fspath(target)}: it would be published with the release"
        )


def _hub_repository(root: Path) -> list[Path]:
    """Return the folder of blobs that a snapshot in a hub cache links to: models--ORG--NAME/snapshots/REV/x -> ../../blobs/SHA."""
    if root.parent.name == _SNAPSHOTS and (root.parents[1] / "blobs").is_dir():
        return [root.parents[1] / "blobs"]
    return []
