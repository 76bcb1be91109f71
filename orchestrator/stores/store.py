"""The protocol of stores, and its checks.

Every store passes tests/contracts/store_contract.py. An object appears whole or not at all; an exception inside a writer publishes
nothing. The first request of a process makes the client. A pickled store is its URL and its options, so that no credential ever
leaves a process.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from orchestrator.base.errors import BUG, StoreError

BLOCK_BYTES = 8 * 2**20
"""Largest block of `Store.blocks`, and smallest part of an upload."""
Block = bytes | memoryview


class ObjectExistsError(StoreError):
    """put(create=True) found an existing object."""


class ObjectMissingError(StoreError):
    """The object does not exist."""

    default_advice = "It was deleted or never written."


class ObjectChangedError(StoreError):
    """An object was replaced while it was read."""

    default_advice = "Read it again; leave the store's objects alone while others read them."


class NoSuchUploadError(StoreError):
    """The multipart upload does not exist, or no longer."""

    default_advice = "Something aborted it: raise the age at which a lifecycle rule or a collector does so."


@dataclass(frozen=True, slots=True)
class Fetched:
    """A range of an object, with a mark of the object's version where the store gives one."""

    data: Block
    etag: str = ""
    num_bytes: int = -1
    """Size of the whole object; -1 where the store does not report it."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Upload:
    """An unfinished write: invisible, but it takes space. A killed process leaves it behind."""

    key: str
    """Key of the target object, or of the temporary one."""
    upload_id: str
    """The store's id of the upload; empty where the key suffices."""
    started_at: datetime


class Writer:
    """A streaming write: the object appears when the block ends, and nothing remains when the block raises.

    Base of the stores' writers: counts bytes, and commits only when their number is the announced one.
    """

    def __init__(self, key: str, num_bytes: int | None) -> None:
        self._key, self._num_bytes = key, num_bytes
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._write(view)
        self._count += len(view)
        return len(view)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self._abort(error)
            return
        try:
            if self._num_bytes is not None and self._count != self._num_bytes:
                raise StoreError(f"{self._key!r}: {self._count} bytes were written, {self._num_bytes} announced", BUG)
            self._commit()
        except BaseException as failure:
            self._abort(failure)
            raise

    def _write(self, view: memoryview) -> None:
        raise NotImplementedError

    def _commit(self) -> None:
        raise NotImplementedError

    def _abort(self, cause: BaseException) -> None:
        """Leave nothing behind; anything that cannot be removed is noted on `cause`."""
        raise NotImplementedError


class Store(Protocol):
    """Objects under keys ('/'-separated, no leading slash) below one URL. All methods raise StoreError on failure."""

    @property
    def url(self) -> str: ...

    def get(self, key: str) -> bytes:
        """Read a whole object. Raises ObjectMissingError."""
        ...

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        """Read bytes [begin, end). Raises ObjectMissingError."""
        ...

    def blocks(self, key: str) -> Iterator[Block]:
        """Yield a whole object in order, in blocks of at most BLOCK_BYTES, several fetched ahead, all of one version.

        Raises ObjectMissingError, and ObjectChangedError when the object was replaced before its last block was read.
        """
        ...

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes; None when it is missing."""
        ...

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """Write a small object at once. With `create`, raises ObjectExistsError if it exists; one of several writers wins."""
        ...

    def writer(self, key: str, num_bytes: int | None = None) -> Writer:
        """Stream an object. `num_bytes`: its size if known, to reserve space first."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Copy within the store, on the server if the store can."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix` (for a folder, end it with '/')."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; a missing object is no error."""
        ...

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        """Yield unfinished writes under keys that start with `prefix`, of live and dead writers."""
        ...

    def abort_upload(self, upload: Upload) -> None:
        """Remove an unfinished write; a missing one is no error. A live writer of it fails."""
        ...

    def check_uploads(self, key: str) -> None:
        """Write a few bytes to `key` in the way of large objects. Raises StoreError that names what the server cannot do."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the object's local file; None when it has none."""
        ...


NO_KEY = "Names in a store are relative paths without '..': whatever names this one was damaged, or made by someone else."


def check_key(key: str) -> None:
    """Check a key. Raises StoreError for one that is empty, absolute, or leads out of the store."""
    if not key or key.startswith("/") or ".." in key.split("/"):
        raise StoreError(f"{key!r} is not a key", NO_KEY)


def check_present(store: Store) -> None:
    """Check that the store was written to: else its address is mistyped, or relative to another folder. Raises StoreError."""
    folder = store.local_path("probe")
    found = folder.parent.is_dir() if folder is not None else next(iter(store.list("")), None) is not None
    if not found:
        raise StoreError(
            f"there is no store at {store.url}", "Check the URL or folder; a relative one counts from the current folder."
        )


def check_writable(store: Store) -> None:
    """Check with a probe object that the store can do what a build needs. Raises StoreError that names what it cannot do.

    A build commits by put-if-absent: a store that ignores the condition would let two builds overwrite each other.
    """
    key, copy = (f"probes/{uuid.uuid4().hex}" for _ in range(2))
    data = b"trt-orchestrator"
    store.put(key, data, create=True)
    try:
        if store.get(key) != data or store.get_range(key, 4, 9) != data[4:9]:
            raise StoreError(
                f"store {store.url} returned other bytes than were written",
                "If it is not AWS, set store_options.checksums: when_required in the cluster file.",
            )
        _check_create_is_refused(store, key)
        store.copy(key, copy)
        store.check_uploads(copy)
    finally:
        store.delete(key)
        store.delete(copy)


def _check_create_is_refused(store: Store, key: str) -> None:
    try:
        store.put(key, b"a second object", create=True)
    except ObjectExistsError:
        return
    raise StoreError(
        f"store {store.url} ignores put-if-absent (If-None-Match: *): two builds could overwrite each other's commits",
        "Use a server that has conditional writes (AWS S3, Ceph RGW, SeaweedFS, MinIO), or a file:// store on a shared folder.",
    )
