"""Output folder of a pull, entered by descriptors: nothing is ever written outside of it, whatever it already contains.

Every component below the folder is opened relative to its parent and never through a symbolic link. New files are made under free
names (O_EXCL) and moved into place by rename, which replaces a link instead of following it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from orchestrator.base.errors import StoreError, store_error

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags of an open file. O_NONBLOCK: opening a planted pipe must not wait."""
_MODE = 0o644


@dataclass(frozen=True, slots=True)
class Spot:
    """A name in an open folder."""

    folder: int
    """Descriptor of the folder."""
    name: str
    path: Path
    """Path for messages."""

    def beside(self, name: str) -> Spot:
        return Spot(self.folder, name, self.path.with_name(name))

    def stat(self) -> os.stat_result | None:
        """Return the status of the name, not following links; None when nothing is there."""
        try:
            return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self) -> int | None:
        """Open the plain file of this name to read, return the descriptor; None when it is missing or not a plain file."""
        return self._opened(os.O_RDONLY)

    def open_own(self) -> tuple[int, bool]:
        """Open a file under a name of our own to read and write; returns the descriptor, and whether the file is new.

        A link, a pipe or a file with another hard link is removed first, never written through.
        """
        while True:
            found = self._opened(os.O_RDWR)
            if found is not None:
                return found, False
            with contextlib.suppress(FileExistsError):
                return self.create(), True
            if not self._is_own():  # else another pull has just made it
                self.unlink()

    def _opened(self, flags: int) -> int | None:
        try:
            descriptor = os.open(self.name, flags | _FILE, dir_fd=self.folder)
        except FileNotFoundError:
            return None
        except OSError:
            found = self.stat()
            if found is not None and stat.S_ISREG(found.st_mode):
                raise
            return None
        opened = os.fstat(descriptor)
        if stat.S_ISREG(opened.st_mode) and (flags == os.O_RDONLY or opened.st_nlink <= 1):
            return descriptor
        os.close(descriptor)
        return None

    def _is_own(self) -> bool:
        """Whether the file of this name may be written to, or is missing."""
        found = self.stat()
        return found is None or (stat.S_ISREG(found.st_mode) and found.st_nlink <= 1)

    def create(self) -> int:
        """Create the file and return its descriptor. Raises FileExistsError."""
        return os.open(self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, _MODE, dir_fd=self.folder)

    def unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.folder)

    def move_to(self, target: Spot) -> None:
        """Rename to `target`. `OutputFolder.sync` makes the name survive a crash."""
        os.rename(self.name, target.name, src_dir_fd=self.folder, dst_dir_fd=target.folder)


class OutputFolder:
    """The folder itself, created if missing. Its own path may lead through links."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def spot(self, path: str) -> Spot:
        """Return the spot of a checked, relative path, creating folders on the way. Raises StoreError."""
        parent, _, name = path.rpartition("/")
        with self._lock, writing(self.path / path):
            return Spot(self._folder(parent), name, self.path / path)

    def _folder(self, path: str) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = self._open_folder(path)
        return self._descriptors[path]

    def _open_folder(self, path: str) -> int:
        if not path:
            self.path.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, _FOLDER)
        parent, _, name = path.rpartition("/")
        above = self._folder(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=above)
        try:
            return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
        except OSError as error:
            if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
                raise StoreError(
                    f"{self.path / path} is a symbolic link: nothing is written through it",
                    "Remove the link, or choose another --output.",
                ) from None
            raise error from None

    def rename_folder(self, source: str, target: str) -> None:
        """Rename a folder to its final name. Raises StoreError."""
        first, second = self.spot(source), self.spot(target)
        with writing(second.path):
            first.move_to(second)
        for path in [path for path in self._descriptors if path == source or path.startswith(source + "/")]:
            os.close(self._descriptors.pop(path))

    def write_whole(self, path: str, data: bytes) -> None:
        """Write a small file atomically. Raises StoreError."""
        target = self.spot(path)
        temporary = target.beside(f".{uuid.uuid4().hex}.part")
        with writing(target.path):
            try:
                with open(temporary.create(), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.move_to(target)
            finally:
                temporary.unlink()

    def link(self, path: str, name: str) -> None:
        """Make `path` a symbolic link to `name`, a file in the same folder. Replaces what is there. Raises StoreError."""
        assert "/" not in name
        target = self.spot(path)
        temporary = target.beside(f".{uuid.uuid4().hex}.part")
        with writing(target.path):
            try:
                os.symlink(name, temporary.name, dir_fd=temporary.folder)
                temporary.move_to(target)
            finally:
                temporary.unlink()

    def sync(self) -> None:
        """Make all new names in the folder survive a crash. Raises StoreError."""
        with writing(self.path):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)

    def free_bytes(self) -> int:
        with writing(self.path):
            return shutil.disk_usage(self._folder("")).free


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn OSError into StoreError that names the file."""
    try:
        yield
    except OSError as error:
        raise store_error(f"cannot write {path}", error) from error
