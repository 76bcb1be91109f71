"""Sources at any URL that has a store: s3://, gs://, memory://. Nothing is copied to disk.

A large range is fetched in parts, several at once, each tried again when the network fails. Small tensors that lie side by
side are fetched together, once, when the reader has said what it will ask for. Every part of an S3 object is checked to be
of the version that the plan was made from by the ETag that came with it: `If-Match` would say the same, but Ceph's gateway
refuses the quoted ETag that every client sends.
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
from types import TracebackType
from typing import Any, Self, TypeVar

from orchestrator.base.errors import OrchestratorError, SourceCorruptError, SourceMissingError
from orchestrator.model.checkpoint import SourceFile
from orchestrator.stores.fsspec import FsspecStore
from orchestrator.stores.retrying import TruncatedError
from orchestrator.stores.source import ByteSource, PlannedRange, check_unchanged
from orchestrator.stores.store import Block, ObjectMissingError

PART_BYTES = 8 * 2**20
"""A range is split into parts of about this size: between two thirds and one and a half of it."""
SMALL_BYTES = 4 * 2**20
"""Reads below it are worth fetching together with their neighbours."""
WINDOW_BYTES = 16 * 2**20
"""The most that is fetched at once for small reads."""
_HELD_BYTES = 256 * 2**20
"""Windows in memory at once, fetched and not yet used up; reads beyond that go to the source one by one."""
_THREADS = 8
_CONTENT_FIELDS = ("md5Hash", "content_md5")
"""MD5 of the content, on Google's and Azure's stores: there an ETag changes when only metadata does."""
_ETAG_FIELDS = ("ETag", "etag")
_TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "created")

T = TypeVar("T")


class RemoteFolder:
    """A prefix of an object store, read through the client that the store of such a URL has."""

    def __init__(self, store: FsspecStore) -> None:
        self.url, self._store = store.url, store

    def names(self) -> list[str]:
        names = sorted(info.key for info in self._store.list(""))
        if not names:
            raise SourceMissingError(f"there is nothing at {self.url}", "Check source.path in the spec.")
        return names

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """As SourceFolder says; a range that ends behind the file is cut there. Raises SourceMissingError, StoreError."""
        size = self.source_file(name).num_bytes
        stop = size if end is None else min(end, size)
        return bytes(self.fetch(name, begin, stop)) if begin < stop else b""

    def source_file(self, name: str) -> SourceFile:
        """Identity: a checksum of the content, else the ETag, else the time of modification, else nothing but the size."""
        return self.source_version(name)[0]

    def source_version(self, name: str) -> tuple[SourceFile, str]:
        """A file as `source_file` says, and the ETag of this version of it, empty where there is none."""
        info = self._store.look(name)
        if info is None:
            raise SourceMissingError(f"{self.url}/{name} is not there")
        etag = next((str(info[field]).strip('"') for field in _ETAG_FIELDS if info.get(field)), "")
        return SourceFile(name, int(info["size"]), _identity(info)), etag

    def open(self, files: tuple[SourceFile, ...], planned: Iterable[PlannedRange] = ()) -> ByteSource:
        return RemoteSource(self, files, planned)

    def fetch(self, name: str, begin: int, end: int, etag: str = "") -> Block:
        """Bytes [begin, end), all of them, of the object with that ETag (empty: with any).

        Raises SourceMissingError, SourceCorruptError when it ends early or was replaced, StoreError when it cannot be read.
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
            raise SourceMissingError(f"{self.url}/{name} is not there") from None
        except OrchestratorError as error:
            if isinstance(error.__cause__, TruncatedError):
                raise SourceCorruptError(str(error.__cause__)) from error
            raise


def _identity(info: dict[str, Any]) -> str:
    """By content where the store knows it, else by what changes whenever that may have changed."""
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
    """sha256 of the content: S3's checksum of an object that was uploaded at once with one, or the hub's of a file of Git LFS."""
    lfs = info.get("lfs")
    if isinstance(lfs, dict) and re.fullmatch(r"[0-9a-f]{64}", str(lfs.get("sha256", ""))):
        return str(lfs["sha256"])
    checksum = str(info.get("ChecksumSHA256") or "")
    if info.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT" or not re.fullmatch(r"[A-Za-z0-9+/]{43}=", checksum):
        return ""
    return base64.b64decode(checksum).hex()


@dataclass
class Window:
    """Small planned ranges of a file that lie side by side, without a gap: bytes [begin, end), fetched once."""

    begin: int
    end: int
    asked: int = 0
    data: Future[Block] | None = None

    @property
    def left(self) -> int:
        """Planned bytes that nobody has asked for yet; at none the window is dropped."""
        return self.end - self.begin - self.asked


def windows(planned: Iterable[PlannedRange]) -> dict[int, list[Window]]:
    """Windows of each file, in order, over the small ranges. No byte is in two of them, none that is not planned in any."""
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
        """ETag of the version that is read, by number of the file."""
        self._lock = threading.Lock()
        """Held to decide who asks for what, never while asking."""
        self._pool = ThreadPoolExecutor(_THREADS, "fetch")
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._windows.clear()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """As ByteSource says. Raises SourceMissingError, SourceCorruptError, StoreError."""
        self._check(file)
        out = buffer.cast("B") if buffer.ndim != 1 or buffer.format != "B" else buffer
        if not len(out):
            return
        if len(out) < SMALL_BYTES and self._from_window(file, offset, out):
            return
        self._fetch_into(file, offset, out)

    def _check(self, file: int) -> str:
        """ETag of a file, which is the one that the plan was made from; the store is asked once."""
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
        """Serve a read from the window that it lies in; False when there is none, or no room to hold it."""
        end = offset + len(out)
        with self._lock:
            mine = self._windows.get(file, [])
            position = bisect.bisect_right(mine, offset, key=lambda window: window.begin) - 1
            if position < 0 or end > mine[position].end:
                return False
            window = mine[position]
            known, size = window.data, window.end - window.begin
            if known is None and (window.left <= len(out) or self._held + size > _HELD_BYTES):
                mine.pop(position)  # the others of it are read alone as well: no byte is to be fetched twice
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
    """Give everyone who waits for it what `make` returns or raises."""
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
