"""Any URL that fsspec knows: memory://, and gs:// or az:// with their fsspec packages. s3.py does S3.

fsspec's `with fs.open(path, "wb")` publishes a truncated object when its block raises. So writers here open with autocommit=False
and commit only at a clean end, or, where that has no effect (memory://), gather the bytes until then. Put-if-absent is fsspec's
mode="create" (a precondition of the request on Google's and Azure's stores). Repeatable requests are retried here, writes only as
far as the scheme's package does.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from orchestrator.base.errors import OrchestratorError, StoreError
from orchestrator.stores.folders import find_files
from orchestrator.stores.retrying import Backoff, RefusedCredentialsError, TransientError, told_apart
from orchestrator.stores.store import (
    BLOCK_BYTES,
    Block,
    Fetched,
    NoSuchUploadError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectInfo,
    ObjectMissingError,
    Upload,
    Writer,
    check_key,
)

T = TypeVar("T")

_BLOCK_BYTES = 16 * 2**20
_VERSION_FIELDS = ("etag", "md5Hash", "content_md5", "mtime", "created")
_MEMORY_LOCK = threading.Lock()
_INHERITED: list[Any] = []
"""Clients of a parent process, kept from the garbage collector, whose finalizer would wait for the parent's threads."""


def check_scheme(url: str, what: str) -> None:
    """Check the scheme. Raises StoreError when fsspec does not know it, or lacks its package."""
    from fsspec.registry import get_filesystem_class, known_implementations
    from fsspec.utils import get_protocol

    try:
        get_filesystem_class(get_protocol(url))
    except ImportError as error:
        package = known_implementations[get_protocol(url)]["class"].partition(".")[0]
        raise StoreError(f"cannot open the {what} {url!r}: {error}", f"On every node: pip install {package}.") from None
    except ValueError as error:
        raise StoreError(
            f"cannot open the {what} {url!r}: {error}",
            "Schemes: file, s3, memory; gs and az with their packages; and those of fsspec packages that are installed.",
        ) from None


class FsspecStore:
    """Objects below an fsspec URL. The first request of a process makes the client, which is never pickled."""

    def __init__(self, url: str, *, fs: Any = None, backoff: Backoff | None = None) -> None:
        """Connects to nothing yet. `fs`: a file system to use instead of the URL's own; stores may share it."""
        self.url = url.rstrip("/")
        self.commits = not url.startswith("memory:")
        """Whether autocommit=False holds back a file until it is committed."""
        self._backoff = backoff or Backoff()
        self._lock = threading.Lock()
        self._client, self._process_id = fs, os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    @property
    def fs(self) -> Any:
        """Client of this process. It caches no listings."""
        with self._lock:
            if self._process_id != os.getpid():
                _INHERITED.append(self._client)
                self._client, self._process_id = None, os.getpid()
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        import fsspec

        options = {"skip_instance_cache": True, "use_listings_cache": False} if self.commits else {}
        return fsspec.url_to_fs(self.url, **options)[0]

    def _renew(self, seen: Any) -> None:
        """Drop the client `seen`, so that the next request reads credentials again."""
        with self._lock:
            if self._client is seen:
                self._client = None

    @property
    def _root(self) -> str:
        return str(self.fs._strip_protocol(self.url)).rstrip("/")

    def path(self, key: str) -> str:
        """Return the client's path of a key. Raises StoreError for an invalid key."""
        check_key(key)
        return f"{self._root}/{key}"

    def get(self, key: str) -> bytes:
        return bytes(self.fetch(key, 0, None).data)

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        if begin < end:
            return bytes(self.fetch(key, begin, end).data)
        if self.size(key) is None:
            raise ObjectMissingError(f"{self.url} has no object {key!r}")
        return b""

    def fetch(self, key: str, begin: int, end: int | None) -> Fetched:
        """Read bytes [begin, end) of an object, fewer at its end."""
        return self.retried(f"read {key!r}", lambda: self.fetch_once(key, begin, end))

    def fetch_once(self, key: str, begin: int, end: int | None) -> Fetched:
        """Do `fetch` in one request. Raises errors for `told_apart`."""
        return Fetched(self.fs.cat_file(self.path(key), start=begin, end=end))

    def blocks(self, key: str) -> Iterator[Block]:
        """See Store. Asks for the version only before the first block and after the last."""
        before = self._version(key)
        for begin in range(0, before[0], BLOCK_BYTES):
            end = min(begin + BLOCK_BYTES, before[0])
            block = self.get_range(key, begin, end)
            if end == before[0] and self._version(key) != before:
                raise ObjectChangedError(f"{key!r} in {self.url} was replaced while it was read")
            yield block

    def _version(self, key: str) -> tuple[int, str]:
        """Return the size, and a mark that distinguishes versions of an object."""
        info = self.look(key)
        if info is None:
            raise ObjectMissingError(f"cannot read {key!r}: {self.url} has no such object")
        return int(info["size"]), "".join(str(info.get(field, "")) for field in _VERSION_FIELDS)

    def look(self, key: str) -> dict[str, Any] | None:
        """Return the store's facts about an object, at least its 'size'; None when it is missing."""
        try:
            info: dict[str, Any] = self.retried(f"look at {key!r}", lambda: self.fs.info(self.path(key)))
        except ObjectMissingError:
            return None
        return info if info["type"] == "file" else None

    def size(self, key: str) -> int | None:
        info = self.look(key)
        return None if info is None else int(info["size"])

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        # memory:// looks first and writes afterwards: one at a time makes that one decision.
        with self.errors(f"write {key!r}"), contextlib.nullcontext() if self.commits else _MEMORY_LOCK:
            self.fs.pipe_file(self.path(key), data, mode="create" if create else "overwrite")

    def writer(self, key: str, num_bytes: int | None = None) -> Writer:
        return FsspecWriter(self, key, num_bytes)

    def copy(self, source: str, target: str) -> None:
        self.retried(f"copy {source!r}", lambda: self.fs.cp_file(self.path(source), self.path(target)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store. Looks at every object of the folder that holds this prefix."""
        root = self._root
        folder = f"{root}/{prefix.rpartition('/')[0]}".rstrip("/")
        for path, info in self.retried(f"list {prefix!r}", lambda: find_files(self.fs, folder)).items():
            if info["type"] == "file" and path.startswith(f"{root}/{prefix}") and not path.endswith("/"):
                yield ObjectInfo(path[len(root) + 1 :], int(info["size"]))

    def delete(self, key: str) -> None:
        with contextlib.suppress(ObjectMissingError):
            self.retried(f"delete {key!r}", lambda: self.fs.rm_file(self.path(key)))

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        """Yield nothing: such services remove uncommitted uploads within a week."""
        yield from ()

    def abort_upload(self, upload: Upload) -> None:
        """Do nothing: there are no uploads."""

    def check_uploads(self, key: str) -> None:
        """Do nothing: large objects need nothing that small ones do not."""

    def local_path(self, key: str) -> Path | None:
        return None

    def retried(self, doing: str, attempt: Callable[[], T]) -> T:
        """Call `attempt` until it returns, with backoff and one new connection. Raises as `errors`."""
        with self.errors(doing, self._backoff.max_attempts):
            return self._backoff.run(attempt, functools.partial(self._renew, self.fs))

    @contextlib.contextmanager
    def errors(self, doing: str, attempts: int = 1) -> Iterator[None]:
        """Turn lasting failures of requests into StoreErrors that name the operation."""
        try:
            yield
        except Exception as error:
            failure = self._meaning(doing, attempts, told_apart(error))
            if failure is error:
                raise
            raise failure from error

    def _meaning(self, doing: str, attempts: int, failure: Exception) -> Exception:
        if isinstance(failure, TransientError):
            return StoreError(
                f"cannot {doing} in {self.url}{f', tried {attempts} times' if attempts > 1 else ''}: {failure}",
                "The server or the network fails: see that the endpoint answers, then run the same command again.",
            )
        if isinstance(failure, RefusedCredentialsError):
            return StoreError(
                f"cannot {doing} in {self.url}: credentials were refused: {failure}",
                "Renew this machine's credentials; use a role or web identity, which renew themselves, for long builds.",
            )
        if isinstance(failure, ObjectMissingError):
            return ObjectMissingError(f"cannot {doing}: {self.url} has no such object")
        if isinstance(failure, ObjectExistsError):
            return ObjectExistsError(f"cannot {doing}: {self.url} already has it")
        if isinstance(failure, StoreError) and not isinstance(failure, ObjectChangedError | NoSuchUploadError):
            return type(failure)(f"cannot {doing} in {self.url}: {failure.message}", failure.advice)
        assert isinstance(failure, OrchestratorError)
        return failure


class FsspecWriter(Writer):
    """A streaming write that commits only at a clean end."""

    def __init__(self, store: FsspecStore, key: str, num_bytes: int | None) -> None:
        super().__init__(key, num_bytes)
        check_key(key)
        self._store = store
        self._file: Any = None

    def __enter__(self) -> Self:
        options = {"autocommit": False, "block_size": _BLOCK_BYTES}
        with self._errors():
            path = self._store.path(self._key)
            self._file = self._store.fs.open(path, "wb", **options) if self._store.commits else io.BytesIO()
        return self

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return self._store.errors(f"write {self._key!r}")

    def _write(self, view: memoryview) -> None:
        with self._errors():
            self._file.write(view)

    def _commit(self) -> None:
        if not self._store.commits:
            self._store.put(self._key, self._file.getvalue())
            return
        with self._errors():
            self._file.close()
            self._file.commit()

    def _abort(self, cause: BaseException) -> None:
        try:
            with self._errors():
                if self._store.commits:
                    self._file.discard()
        except StoreError as failure:
            cause.add_note(f"something of {self._key!r} was left behind: {failure}")
