"""Stores: where bytes go. The protocol, and the table of members by URL scheme.

Every member passes tests/contracts/store_contract.py. An object appears whole or not at all; an exception inside a
writer publishes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

from orchestrator.core.errors import StoreError


class ObjectExistsError(StoreError):
    """put(create=True) met an object."""


class ObjectMissingError(StoreError):
    """There is no such object."""

    default_advice = "It was deleted or never written."


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    num_bytes: int


class Writer(Protocol):
    """A streaming write: appears under its key when the block ends, vanishes when it ends with an exception."""

    def write(self, data: bytes | bytearray | memoryview) -> int: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...


class Store(Protocol):
    """Objects under keys ('/'-separated, no leading slash) below one URL. All methods raise StoreError on failure."""

    @property
    def url(self) -> str: ...

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectMissingError."""
        ...

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end). Raises ObjectMissingError."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of the object; None when there is none."""
        ...

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """Write a small object at once. With `create`, raises ObjectExistsError if there is one; of several at once one wins."""
        ...

    def writer(self, key: str, num_bytes: int | None = None) -> Writer:
        """Stream an object; `num_bytes` is its size where known, so that room is reserved first."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Copy within the store, without the bytes passing through this process where the store can."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix` (a folder: end it with '/')."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; none there is no error."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The object as a file of this machine, where it is one."""
        ...


def open_store(url: str) -> Store:
    """Open the store at `url`: file:///folder, memory://name, or any URL that fsspec knows. Raises StoreError."""
    scheme = urlsplit(url).scheme
    if not scheme:
        raise StoreError(f"store {url!r} has no scheme", "Write file:///absolute/folder, s3://bucket/prefix, ...")
    if scheme == "file":
        from orchestrator.stores.file import FileStore

        return FileStore(url)
    from orchestrator.stores.fsspec import FsspecStore

    return FsspecStore(url)


def check_writable(store: Store) -> None:
    """Write, read back and delete a probe. Raises StoreError with the store's own words."""
    import uuid

    key = f"probes/{uuid.uuid4().hex}"
    data = b"trt-orchestrator"
    store.put(key, data, create=True)
    try:
        if store.get(key) != data:
            raise StoreError(f"store {store.url} returned other bytes than were written")
    finally:
        store.delete(key)
