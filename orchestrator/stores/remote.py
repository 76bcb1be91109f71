"""Sources at any URL that has a store: s3://, gs://, memory://. Nothing is copied to disk.

A large range is fetched in parts, several at once, each retried when the network fails. Adjacent small tensors are fetched
together, once, if the reader has announced its reads. Every part of an S3 object is checked to belong to the plan's version by
the ETag that came with it: `If-Match` would do the same, but Ceph's gateway refuses the quoted ETag that every client sends.
"""

from __future__ import annotations

import base64
import bisect
import itertools
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

from orchestrator.base.errors import OrchestratorError, SourceCorruptError, SourceMissingError
from orchestrator.model.checkpoint import SourceFile
from orchestrator.stores.fsspec import FsspecStore
from orchestrator.stores.retrying import TruncatedError
from orchestrator.stores.source import ByteSource, PlannedRange, check_unchanged
from orchestrator.stores.store import Block, ObjectMissingError

PART_BYTES = 8 * 2**20
"""Size of the parts of a range: each has between two thirds and one and a half of it."""
SMALL_BYTES = 4 * 2**20
"""Smaller reads are fetched together with their neighbours."""
WINDOW_BYTES = 16 * 2**20
"""Largest fetch for small reads."""
_HELD_BYTES = 256 * 2**20
"""Memory of the windows that are fetched and not yet used up. Reads beyond that go to the source one by one."""
_THREADS = 8
_CONTENT_FIELDS = ("md5Hash", "content_md5")
"""Fields with the content's MD5 on Google's and Azure's stores: there an ETag also changes with metadata."""
_ETAG_FIELDS = ("ETag", "etag")
_TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "created")

T = TypeVar("T")


class RemoteFolder:
    """A prefix of an object store, read through the client of such a URL's store."""

    def __init__(self, store: FsspecStore) -> None:
        self.url, self._store = store.url, store

    def names(self) -> list[str]:
        names = sorted(info.key for info in self._store.list(""))
        if not names:
            raise SourceMissingError(f"there is nothing at {self.url}", "Check source.path in the spec.")
        return names

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """See SourceFolder. A range that ends behind the file is cut there. Raises SourceMissingError, StoreError."""
        size = self.source_file(name).num_bytes
        stop = size if end is None else min(end, size)
        return bytes(self.fetch(name, begin, stop)) if begin < stop else b""

    def source_file(self, name: str) -> SourceFile:
        """Return a file. Identity: a checksum of the content, else the ETag, else the time of modification, else only the size."""
        return self.source_version(name)[0]

    def source_version(self, name: str) -> tuple[SourceFile, str]:
        """Return a file like `source_file`, and the ETag of this version, empty without one."""
        info = self._store.look(name)
        if info is None:
            raise SourceMissingError(f"{self.url}/{name} is missing")
        etag = next((str(info[field]).strip('"') for field in _ETAG_FIELDS if info.get(field)), "")
        return SourceFile(name, int(info["size"]), _identity(info)), etag

    def open(self, files: tuple[SourceFile, ...], planned: Iterable[PlannedRange] = ()) -> ByteSource:
        return RemoteSource(self, files, planned)

    def fetch(self, name: str, begin: int, end: int, etag: str = "") -> Block:
        """Read all bytes [begin, end) of the object with that ETag (empty: any).

        Raises SourceMissingError, SourceCorruptError when the object ends early or was replaced, StoreError when it cannot be read.
        """

        def attempt() -> Block:
            found = self._store.fetch_once(name, begin, end)
            if etag and found.etag and found.etag != etag:
                raise SourceCorruptError(
                    f"{self.url}/{name} was replaced while it was read: it is etag:{found.etag}, planned etag:{etag}",
                    "Make the plan again, and leave the source alone until the build has ended.",
                )
            if len(found.data) != end - begin:
                raise TruncatedError(f"{self.url}/{name} ended at byte {begin + len(found.data)}, asked for {begin} to {end}")
            return found.data

        try:
            return self._store.retried(f"read {name!r}", attempt)
        except ObjectMissingError:
            raise SourceMissingError(f"{self.url}/{name} is missing") from None
        except OrchestratorError as error:
            if isinstance(error.__cause__, TruncatedError):
                raise SourceCorruptError(str(error.__cause__)) from error
            raise


def _identity(info: dict[str, Any]) -> str:
    """Return an identity by content where the store knows it, else by a mark that changes with every write."""
    if sha256 := _sha256(info):
        return f"sha256:{sha256}"
    if "git" in info:
        return f"git:{info['git']}"
    for field in _CONTENT_FIELDS:
        if info.get(field):
            return f"md5:{info[field]}"
    for field in _ETAG_FIELDS:
        if info.get(field):
            return "etag:" + str(info[field]).strip('"')
    return next((f"time:{info[field]}" for field in _TIME_FIELDS if info.get(field)), f"size:{info['size']}")


def _sha256(info: dict[str, Any]) -> str:
    """Return the content's sha256: S3's checksum of an object uploaded in one request, or the hub's of a Git LFS file."""
    lfs = info.get("lfs")
    if isinstance(lfs, dict) and re.fullmatch(r"[0-9a-f]{64}", str(lfs.get("sha256", ""))):
        return str(lfs["sha256"])
    checksum = str(info.get("ChecksumSHA256") or "")
    if info.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT" or not re.fullmatch(r"[A-Za-z0-9+/]{43}=", checksum):
        return ""
    return base64.b64decode(checksum).hex()


@dataclass
class Window:
    """Adjacent small planned ranges of a file without a gap: bytes [begin, end), fetched once."""

    begin: int
    end: int
    asked: int = 0
    data: Future[Block] | None = None

    @property
    def left(self) -> int:
        """Planned bytes that are not yet read; at zero the window is dropped."""
        return self.end - self.begin - self.asked


def windows(planned: Iterable[PlannedRange]) -> dict[int, list[Window]]:
    """Return the windows over the small ranges by file, in order. They do not overlap and hold only planned bytes."""
    found: dict[int, list[Window]] = {}
    for file, begin, end in sorted({item for item in planned if 0 < item[2] - item[1] < SMALL_BYTES}):
        mine = found.setdefault(file, [])
        if mine and (begin < mine[-1].end or (begin == mine[-1].end and end - mine[-1].begin <= WINDOW_BYTES)):
            mine[-1].end = max(end, mine[-1].end)
        else:
            mine.append(Window(begin, end))
    return found


class RemoteSource:
    """Objects opened on first use. Several threads may read at once."""

    def __init__(self, place: RemoteFolder, files: tuple[SourceFile, ...], planned: Iterable[PlannedRange] = ()) -> None:
        self._place, self._files = place, files
        self._windows = windows(planned)
        self._held = 0
        self._etags: dict[int, Future[str]] = {}
        """ETag of the version that is read, by file number."""
        self._lock = threading.Lock()
        """Held to decide which thread asks the store, never while asking."""
        self._pool = ThreadPoolExecutor(_THREADS, "fetch")
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._windows.clear()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """See ByteSource. Raises SourceMissingError, SourceCorruptError, StoreError."""
        self._check(file)
        out = buffer.cast("B") if buffer.ndim != 1 or buffer.format != "B" else buffer
        if not len(out):
            return
        if len(out) < SMALL_BYTES and self._from_window(file, offset, out):
            return
        self._fetch_into(file, offset, out)

    def _check(self, file: int) -> str:
        """Return the ETag of a file after checking that it is the planned file; the store is asked once."""
        with self._lock:
            known = self._etags.get(file)
            future = known or self._etags.setdefault(file, Future())
        if known is None:
            _fill(future, partial(self._ask, self._files[file]))
        return future.result()

    def _ask(self, planned: SourceFile) -> str:
        found, etag = self._place.source_version(planned.name)
        check_unchanged(planned, found, self._place.url)
        return etag

    def _from_window(self, file: int, offset: int, out: memoryview) -> bool:
        """Serve a read from its window; False without a window, or without memory to hold it."""
        end = offset + len(out)
        with self._lock:
            mine = self._windows.get(file, [])
            position = bisect.bisect_right(mine, offset, key=lambda window: window.begin) - 1
            if position < 0 or end > mine[position].end:
                return False
            window = mine[position]
            known, size = window.data, window.end - window.begin
            if known is None and (window.left <= len(out) or self._held + size > _HELD_BYTES):
                mine.pop(position)  # other reads of the window are fetched alone as well: no byte is fetched twice
                return False
            if known is None:
                self._held += size
            data = window.data = known or Future()
        if known is None:
            _fill(data, lambda: self._fetch(file, window.begin, min(window.end, self._files[file].num_bytes)))
        piece = data.result()[offset - window.begin : end - window.begin]
        if len(piece) != len(out):
            raise SourceCorruptError(f"{self._place.url}/{self._files[file].name} ended at byte {offset + len(piece)}")
        out[:] = piece
        with self._lock:
            window.asked += len(out)
            if window.left <= 0 and window in mine:
                self._held -= size
                mine.remove(window)
        return True

    def _fetch_into(self, file: int, offset: int, out: memoryview) -> None:
        count = max(1, round(len(out) / PART_BYTES))
        bounds = [len(out) * number // count for number in range(count + 1)]

        def fetch(begin: int, end: int) -> None:
            out[begin:end] = self._fetch(file, offset + begin, offset + end)

        if count == 1:
            fetch(0, len(out))
            return
        jobs = [self._pool.submit(fetch, begin, end) for begin, end in itertools.pairwise(bounds)]
        try:
            for job in jobs:
                job.result()
        finally:  # nothing may write into the caller's buffer after this returns
            for job in jobs:
                job.cancel() or job.exception()

    def _fetch(self, file: int, begin: int, end: int) -> Block:
        planned = self._files[file]
        if end > planned.num_bytes:
            raise SourceCorruptError(
                f"{self._place.url}/{planned.name} ended at byte {planned.num_bytes}, asked for {begin} to {end}"
            )
        data = self._place.fetch(planned.name, begin, end, self._check(file))
        with self._lock:
            self.bytes_read += len(data)
        return data


def _fill(future: Future[T], make: Callable[[], T]) -> None:
    """Give all waiting threads the result or error of `make`."""
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
