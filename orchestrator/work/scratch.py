"""Scratch folders of this machine, each locked by its process. The next process removes folders whose owner is dead."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from orchestrator.base.errors import store_error
from orchestrator.base.locks import hold, remove_unheld

_PREFIX = "trt-orchestrator-"
_NAME = re.compile(rf"{_PREFIX}[0-9a-z]*-[0-9a-f]{{12}}")
"""Pattern of our folder names. The root may be a shared /tmp: no other name is ever touched."""
_LOOK_SECONDS = 0.05


@contextlib.contextmanager
def scratch_folder(root: str | Path, build_id: str = "") -> Iterator[Path]:
    """Create a folder below `root` and remove it after the block. If the process is killed, the next `remove_dead` removes it.

    The name contains `build_id`, to show the owner. Raises OSError.
    """
    path, lock = _make(Path(root), build_id)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_dead(root: str | Path, patience_seconds: float = 0.0) -> list[Path]:
    """Remove the scratch folders below `root` that no living process owns; returns them. Never raises.

    `patience_seconds`: longest wait for owners that are dying; a living owner costs all of it.
    """
    removed: list[Path] = []
    end = time.monotonic() + patience_seconds
    while True:
        removed += [path for path in _folders(root) if remove_unheld(path)]
        if not _folders(root) or time.monotonic() >= end:
            return removed
        time.sleep(_LOOK_SECONDS)


def _folders(root: str | Path) -> list[Path]:
    try:
        return [Path(entry) for entry in os.scandir(root) if _NAME.fullmatch(entry.name)]
    except OSError:
        return []


def _make(root: Path, build_id: str) -> tuple[Path, int]:
    while True:
        path = root / f"{_PREFIX}{build_id}-{uuid.uuid4().hex[:12]}"
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise store_error(f"cannot write to {root}", error) from None
        try:
            lock = hold(path)
        except FileNotFoundError:  # another process took it for dead before it was locked
            continue
        if path.is_dir() and path.stat().st_ino == os.fstat(lock).st_ino:
            return path, lock
        os.close(lock)
