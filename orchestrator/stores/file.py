"""file:// on a POSIX file system, local or shared.

An object is written under a temporary name, synced, then linked to its own name: link(2) fails when the name is taken, atomically,
on NFS too. Copies are hard links where possible, because objects are never written in place. Large objects bypass the page cache:
filling it costs more CPU than sha256, and its memory is charged to the container.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from orchestrator.base.errors import StoreError, store_error
from orchestrator.base.pages import PAGE_BYTES, is_on_page, page_buffer
from orchestrator.stores.folders import files_below
from orchestrator.stores.store import (
    BLOCK_BYTES,
    Block,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Upload,
    Writer,
    check_key,
)

_TEMPORARY = ".tmp-"
_DIRECT_BYTES = 64 * 2**20
"""Objects announced to be at least this large are written with O_DIRECT, where the file system supports it."""
_STAGE_BYTES = 4 * 2**20
_UNSTAGED_BYTES = 2**20
"""Pieces at least this large are written without staging if they are page-aligned, in one request each."""


class FileStore:
    """Objects as files below a folder."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"store {url!r} names a host", "Write file:///absolute/folder, with three slashes.")
        self.url = url.rstrip("/")
        self.root = Path(unquote(parts.path))

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def get(self, key: str) -> bytes:
        with self._reading(key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        with self._reading(key), self._path(key).open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def blocks(self, key: str) -> Iterator[Block]:
        # An open file stays the same version: objects are replaced by name, never written in place.
        with self._reading(key), self._path(key).open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def size(self, key: str) -> int | None:
        try:
            found = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        with FileWriter(self, key, len(data), create) as writer:
            writer.write(data)

    def writer(self, key: str, num_bytes: int | None = None) -> FileWriter:
        return FileWriter(self, key, num_bytes, create=False)

    def copy(self, source: str, target: str) -> None:
        with self._reading(source):
            path = self._path(target)
            self._make_folder(path)
            temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
            try:
                self._link_or_copy(self._path(source), temporary)
                temporary.replace(path)
            finally:
                # Renaming one name of a file onto another name of the same file does nothing and leaves both.
                temporary.unlink(missing_ok=True)

    @staticmethod
    def _link_or_copy(source: Path, target: Path) -> None:
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # another file system below the same root, or one without links
            shutil.copyfile(source, target)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for path, key in self._below(prefix):
            if key.startswith(prefix) and not path.name.startswith(_TEMPORARY):
                with self._listing(prefix), contextlib.suppress(FileNotFoundError):  # deleted just now
                    yield ObjectInfo(key, path.stat().st_size)

    def _below(self, prefix: str) -> Iterator[tuple[Path, str]]:
        """Yield every file of the folder that holds this prefix, with its key. Raises StoreError for an unreadable folder."""
        parent = prefix.rpartition("/")[0]
        folder = self._path(parent) if parent else self.root
        with self._listing(prefix):
            for path in files_below(folder):
                yield path, path.relative_to(self.root).as_posix()

    @contextlib.contextmanager
    def _listing(self, prefix: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            raise StoreError(
                f"cannot list {prefix!r} in {self.url}: {error.strerror or error}{where}",
                "Make every folder of the store readable for this user.",
            ) from error

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotADirectoryError):
            self._path(key).unlink(missing_ok=True)

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        """Yield temporary files. Their keys show the folder of the target object, not its name."""
        for path, key in self._below(prefix):
            if path.name.startswith(_TEMPORARY):
                with self._listing(prefix), contextlib.suppress(FileNotFoundError):
                    yield Upload(key, "", datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC))

    def abort_upload(self, upload: Upload) -> None:
        self.delete(upload.key)

    def check_uploads(self, key: str) -> None:
        """Do nothing: large objects need nothing that small ones do not."""

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ObjectMissingError(f"{self.url} has no object {key!r}") from None
        except OSError as error:
            raise store_error(f"cannot read or copy {key!r} in {self.url}", error) from error

    def _make_folder(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise store_error(f"cannot write to the store {self.url}", error) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically, even if this process is killed meanwhile. Raises StoreError."""
    FileStore(path.parent.resolve().as_uri()).put(path.name, data)


class FileWriter(Writer):
    """Writes beside the object's name, then links or renames to it."""

    def __init__(self, store: FileStore, key: str, num_bytes: int | None, create: bool) -> None:
        super().__init__(key, num_bytes)
        self._store, self._create = store, create
        self._path = store._path(key)
        self._temporary = self._path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        self._written = 0
        """Bytes written to the file, without staged ones."""
        self._file = -1
        self._stage: _Stage | None = None

    def __enter__(self) -> Self:
        self._store._make_folder(self._path)
        try:
            self._file = self._open()
            if self._num_bytes:
                with contextlib.suppress(OSError):  # no fallocate here: the file grows as it is written
                    os.posix_fallocate(self._file, 0, self._num_bytes)
        except BaseException as error:  # an interrupt too: __exit__ will not run
            self._discard()
            if not isinstance(error, OSError):
                raise
            raise store_error(f"cannot write to the store {self._store.url}", error) from error
        return self

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        if (self._num_bytes or 0) >= _DIRECT_BYTES:
            with contextlib.suppress(OSError):
                file = os.open(self._temporary, flags | os.O_DIRECT, 0o644)
                self._stage = _Stage()
                return file
            self._temporary.unlink(missing_ok=True)
        return os.open(self._temporary, flags, 0o644)

    def _write(self, view: memoryview) -> None:
        with self._errors():
            if self._stage is None:
                self._pwrite(view)
            else:
                self._write_direct(self._stage, view)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise store_error(f"cannot write {self._key!r} to {self._store.url}", error) from error

    def _write_direct(self, stage: _Stage, view: memoryview) -> None:
        """Write straight from the caller's memory when memory and file are page-aligned, else through the stage."""
        if len(view) >= _UNSTAGED_BYTES and stage.is_on_page and is_on_page(view):
            self._pwrite(stage.take_pages())
            whole = len(view) // PAGE_BYTES * PAGE_BYTES
            self._pwrite(view[:whole])
            view = view[whole:]
        for full in stage.fill(view):
            self._pwrite(full)

    def _pwrite(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._file, view[done:], self._written + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._stop_direct():
                    raise
        self._written += done

    def _stop_direct(self) -> bool:
        """Continue through the page cache: some file systems open with O_DIRECT, then refuse it. False: it was already off."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)

    def _flush(self) -> None:
        """Write staged bytes: whole pages directly, the remainder through the page cache."""
        if self._stage is None:
            return
        self._pwrite(self._stage.take_pages())
        self._stop_direct()
        self._pwrite(self._stage.tail)

    def _commit(self) -> None:
        with self._errors():
            self._flush()
            os.fsync(self._file)
            self._give_name()
        self._discard()

    def _give_name(self) -> None:
        if self._create:
            try:
                os.link(self._temporary, self._path)
            except FileExistsError:
                raise ObjectExistsError(f"{self._store.url} already has {self._key!r}") from None
        else:
            self._temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _abort(self, cause: BaseException) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


class _Stage:
    """Gathers small and unaligned pieces in a page-aligned buffer for O_DIRECT."""

    def __init__(self) -> None:
        self._buffer = page_buffer(_STAGE_BYTES)
        self._filled = 0
        self.tail = self._buffer[:0]
        """Less than a page: the remainder of `take_pages`."""

    @property
    def is_on_page(self) -> bool:
        """Whether the next byte of the file begins a page."""
        return self._filled % PAGE_BYTES == 0

    def fill(self, view: memoryview) -> Iterator[memoryview]:
        """Take in `view`; yields the buffer each time it is full."""
        while len(view):
            count = min(len(view), _STAGE_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == _STAGE_BYTES:
                yield self._buffer
                self._filled = 0

    def take_pages(self) -> memoryview:
        """Return the remaining whole pages, to be written at once. Only the tail stays staged."""
        pages = self._filled // PAGE_BYTES * PAGE_BYTES
        self.tail = self._buffer[pages : self._filled]
        self._filled = 0
        return self._buffer[:pages]
