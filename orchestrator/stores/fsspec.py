"""Any URL that fsspec knows but S3's: memory://, and gs:// or az:// where their fsspec package is installed.

fsspec's `with fs.open(path, "wb")` publishes a truncated object when its block raises; writers here open with
autocommit=False and commit only at a clean end, or, where that means nothing (memory://), write under another name
and move. Put-if-absent is fsspec's mode="create" (a precondition of the request on Google's and Azure's stores). Requests
are retried as far as the package of the scheme does.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.base.errors import BUG, StoreError, store_error
from orchestrator.stores.folders import find_files
from orchestrator.stores.store import (
    BLOCK_BYTES,
    Block,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Upload,
    check_key,
)

_BLOCK_BYTES = 16 * 2**20
_TEMPORARY = ".tmp-"
_VERSION_FIELDS = ("etag", "md5Hash", "content_md5", "mtime", "created")
_MEMORY_LOCK = threading.Lock()


class FsspecStore:
    """Objects below an fsspec URL. The client is made by the first request of a process, and never pickled."""

    def __init__(self, url: str) -> None:
        from fsspec.registry import get_filesystem_class, known_implementations
        from fsspec.utils import get_protocol

        self.url = url.rstrip("/")
        try:
            get_filesystem_class(get_protocol(url))
        except ImportError as error:
            package = known_implementations[get_protocol(url)]["class"].partition(".")[0]
            raise StoreError(f"cannot open the store {url!r}: {error}", f"On every node: pip install {package}.") from None
        except ValueError as error:
            raise StoreError(
                f"cannot open the store {url!r}: {error}",
                "Schemes: file, s3, memory; gs and az with their packages; and those of fsspec packages that are installed.",
            ) from None
        self.commits = not url.startswith("memory:")
        """Whether autocommit=False keeps a file back until it is committed."""
        self._opened: tuple[int, Any, str] = (0, None, "")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    @property
    def _fs(self) -> Any:
        """A client of this process; it looks things up anew each time."""
        return self._open()[1]

    @property
    def _root(self) -> str:
        return self._open()[2]

    def _open(self) -> tuple[int, Any, str]:
        if self._opened[0] != os.getpid():
            import fsspec

            options = {"skip_instance_cache": True, "use_listings_cache": False} if self.commits else {}
            fs, root = fsspec.url_to_fs(self.url, **options)
            self._opened = (os.getpid(), fs, root.rstrip("/"))
        return self._opened

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self._root}/{key}"

    def get(self, key: str) -> bytes:
        with self._errors(f"read {key!r}"):
            return bytes(self._fs.cat_file(self._path(key)))

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        with self._errors(f"read {key!r}"):
            return bytes(self._fs.cat_file(self._path(key), start=begin, end=end))

    def blocks(self, key: str) -> Iterator[Block]:
        before = self._version(key)
        if before is None:
            raise ObjectMissingError(f"cannot read {key!r}: {self.url} has no such object")
        block = b""
        for begin in range(0, before[0], BLOCK_BYTES):
            block = self.get_range(key, begin, min(begin + BLOCK_BYTES, before[0]))
            if self._version(key) != before:
                raise ObjectChangedError(f"{key!r} in {self.url} was replaced while it was read")
            yield block

    def _version(self, key: str) -> tuple[int, str] | None:
        """Size, and what else tells versions of an object apart."""
        with self._errors(f"read {key!r}"):
            try:
                info = self._fs.info(self._path(key))
            except FileNotFoundError:
                return None
        return int(info["size"]), "".join(str(info.get(field, "")) for field in _VERSION_FIELDS)

    def size(self, key: str) -> int | None:
        with self._errors(f"read {key!r}"):
            try:
                info = self._fs.info(self._path(key))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info["type"] == "file" else None

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        # memory:// looks first and writes afterwards: one at a time makes that one decision.
        with self._errors(f"write {key!r}"), contextlib.nullcontext() if self.commits else _MEMORY_LOCK:
            self._fs.pipe_file(self._path(key), data, mode="create" if create else "overwrite")

    def writer(self, key: str, num_bytes: int | None = None) -> FsspecWriter:
        return FsspecWriter(self, key, num_bytes)

    def copy(self, source: str, target: str) -> None:
        with self._errors(f"copy {source!r}"):
            self._fs.cp_file(self._path(source), self._path(target))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for path, info in self._found(prefix).items():
            key = path[len(self._root) :].lstrip("/")
            if key.startswith(prefix) and (self.commits or _TEMPORARY not in key):
                yield ObjectInfo(key, int(info["size"]))

    def _found(self, prefix: str) -> dict[str, Any]:
        with self._errors(f"list {prefix!r}"):
            folder = f"{self._root}/{prefix.rpartition('/')[0]}".rstrip("/")
            return find_files(self._fs, folder)

    def delete(self, key: str) -> None:
        with self._errors(f"delete {key!r}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        """Temporary objects; none where commits are the service's own, for it forgets what was not committed in a week."""
        if self.commits:
            return
        for path, info in self._found(prefix).items():
            temporary = path[len(self._root) :].lstrip("/")
            key, mark, _ = temporary.partition(_TEMPORARY)
            if mark and key.startswith(prefix):
                yield Upload(key, temporary, datetime.datetime.fromtimestamp(info["created"], datetime.UTC))

    def abort_upload(self, upload: Upload) -> None:
        self.delete(upload.upload_id)

    def check_uploads(self, key: str) -> None:
        """Large objects need nothing that small ones do not."""

    def local_path(self, key: str) -> Path | None:
        return None

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise ObjectExistsError(f"cannot {doing}: {self.url} already has it") from None
        except FileNotFoundError:
            raise ObjectMissingError(f"cannot {doing}: {self.url} has no such object") from None
        except OSError as error:
            raise store_error(f"cannot {doing} in {self.url}", error) from error


class FsspecWriter:
    """A streaming write that commits at a clean end only."""

    def __init__(self, store: FsspecStore, key: str, num_bytes: int | None) -> None:
        self._store, self._key, self._num_bytes = store, key, num_bytes
        self._written = 0
        self._file: Any = None
        store._path(key)  # refuses what is no key
        self._temporary = f"{key}{_TEMPORARY}{uuid.uuid4().hex}"

    def __enter__(self) -> Self:
        with self._store._errors(f"write {self._key!r}"):
            if self._store.commits:
                path = self._store._path(self._key)
                self._file = self._store._fs.open(path, "wb", autocommit=False, block_size=_BLOCK_BYTES)
            else:
                self._file = self._store._fs.open(self._store._path(self._temporary), "wb")
        return self

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        with self._store._errors(f"write {self._key!r}"):
            self._file.write(view)
        self._written += len(view)
        return len(view)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        short = self._num_bytes is not None and self._written != self._num_bytes
        with self._store._errors(f"write {self._key!r}"):
            if kind is None and not short:
                self._commit()
            else:
                self._discard()
        if kind is None and short:
            raise StoreError(f"{self._key!r}: {self._written} bytes were written, {self._num_bytes} announced", BUG)

    def _commit(self) -> None:
        self._file.close()
        if self._store.commits:
            self._file.commit()
        else:
            # Not mv: it would take a key with '?' or '*' in it for a pattern.
            temporary = self._store._path(self._temporary)
            self._store._fs.cp_file(temporary, self._store._path(self._key))
            self._store._fs.rm_file(temporary)

    def _discard(self) -> None:
        if self._store.commits:
            self._file.discard()
        else:
            self._file.close()
            self._store._fs.rm_file(self._store._path(self._temporary))
