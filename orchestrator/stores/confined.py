"""Files of a source that are published with a release: read from within the source only, since others get to read them."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.base.errors import SourceLinkError, SourceMissingError
from orchestrator.stores.source import LocalFolder, SourceFolder

_SNAPSHOTS = "snapshots"


def read_companion(folder: SourceFolder, name: str) -> bytes:
    """A tokenizer or config file. Raises SourceLinkError when it is a link out of the source, and as `SourceFolder.read`."""
    if isinstance(folder, LocalFolder):
        _check_within(folder.folder, name)
    return folder.read(name)


def _check_within(folder: Path, name: str) -> None:
    """Raises SourceLinkError, SourceMissingError."""
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
    """The folder of blobs that a snapshot in a hub cache links to: models--ORG--NAME/snapshots/REV/x -> ../../blobs/SHA."""
    if root.parent.name == _SNAPSHOTS and (root.parents[1] / "blobs").is_dir():
        return [root.parents[1] / "blobs"]
    return []
