"""Sources at any URL that fsspec knows: s3://, gs://, memory://. Nothing is copied to disk.

A large range is fetched in parts, several at once, each tried again when the network fails. Small tensors that lie side by
side are fetched together, once, when the reader has said what it will ask for. Every part of an S3 object is checked to be
of the version that the plan was made from by the ETag that came with it: `If-Match` would say the same, but Ceph's gateway
refuses the quoted ETag that every client sends.

Clients are made in the process that uses them and never leave it: a pickled client holds its credentials.
"""

from __future__ import annotations

import base64
import bisect
import errno
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self, TypeVar

from orchestrator.base.errors import OrchestratorError, SourceCorruptError, SourceMissingError, StoreError
from orchestrator.base.urls import refuse_secret
from orchestrator.model.checkpoint import SourceFile
from orchestrator.stores.folders import find_files
from orchestrator.stores.source import ByteSource, PlannedRange, check_unchanged

PART_BYTES = 8 * 2**20
"""A range is split into parts of about this size: between two thirds and one and a half of it."""
SMALL_BYTES = 4 * 2**20
"""Reads below it are worth fetching together with their neighbours."""
WINDOW_BYTES = 16 * 2**20
"""The most that is fetched at once for small reads."""
_HELD_BYTES = 256 * 2**20
"""Windows in memory at once, fetched and not yet used up; reads beyond that go to the source one by one."""
_THREADS = 8
_ATTEMPTS = 8
_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 30.0
_PERMANENT_ERRNOS = frozenset({errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", -1)})
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_NETWORK_PACKAGES = frozenset({"aiohttp", "aiobotocore", "botocore", "requests", "urllib3", "httpx", "httpcore", "gcsfs", "azure"})
_LASTING_ERRORS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"})
_CONTENT_FIELDS = ("md5Hash", "content_md5")
"""MD5 of the content, on Google's and Azure's stores: there an ETag changes when only metadata does."""
_ETAG_FIELDS = ("ETag", "etag")
_TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "created")

T = TypeVar("T")


class TruncatedError(OSError):
    """A body ended before its range did."""


class RemoteFolder:
    """A prefix of an object store."""

    def __init__(self, url: str, *, fs: Any = None, sleep: Callable[[float], None] = time.sleep) -> None:
        """`fs` is an fsspec file system to use in place of the URL's own. Raises SpecError."""
        refuse_secret(url, "source.path")
        self.url = url.rstrip("/")
        self._given, self._sleep = fs, sleep

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    @cached_property
    def _fs(self) -> Any:
        return self._given if self._given is not None else _client(self.url)

    @cached_property
    def _root(self) -> str:
        return str(self._fs._strip_protocol(self.url)).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def names(self) -> list[str]:
        try:
            found = self._retried("list it", lambda: find_files(self._fs, self._root))
        except FileNotFoundError:
            found = {}
        prefix = self._root + "/"
        files = [path for path, info in found.items() if info["type"] == "file" and path.startswith(prefix)]
        names = sorted(path[len(prefix) :] for path in files if not path.endswith("/"))
        if not names:
            raise SourceMissingError(f"there is nothing at {self.url}", "Check source.path in the spec.")
        return names

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """As SourceFolder says; a range that ends behind the file is cut there. Raises SourceMissingError, StoreError."""
        size = int(self._info(name)["size"])
        stop = size if end is None else min(end, size)
        return self.fetch(name, begin, stop) if begin < stop else b""

    def source_file(self, name: str) -> SourceFile:
        """Identity: a checksum of the content, else the ETag, else the time of modification, else nothing but the size."""
        return self.source_version(name)[0]

    def source_version(self, name: str) -> tuple[SourceFile, str]:
        """A file as `source_file` says, and the ETag of this version of it, empty where there is none."""
        info = self._info(name)
        etag = next((str(info[field]).strip('"') for field in _ETAG_FIELDS if info.get(field)), "")
        return SourceFile(name, int(info["size"]), _identity(info)), etag

    def open(self, files: tuple[SourceFile, ...], planned: Iterable[PlannedRange] = ()) -> ByteSource:
        return RemoteSource(self, files, planned)

    def fetch(self, name: str, begin: int, end: int, etag: str = "") -> bytes:
        """Bytes [begin, end), all of them, of the object with that ETag (empty: with any).

        Raises SourceMissingError, SourceCorruptError when it ends early or was replaced, StoreError when it cannot be read.
        """
        try:
            return self._retried(f"read {name}", partial(self._fetch_once, name, begin, end, etag))
        except FileNotFoundError:
            raise SourceMissingError(f"{self.url}/{name} is not there") from None

    def _fetch_once(self, name: str, begin: int, end: int, etag: str) -> bytes:
        if _is_s3(self._fs):
            data, found = _get_s3(self._fs, self._path(name), begin, end)
            if etag and found and found != etag:
                raise SourceCorruptError(
                    f"{self.url}/{name} was replaced while it was read: it is etag:{found}, planned etag:{etag}",
                    "Make the plan again, and leave the source alone until the build has ended.",
                )
        else:
            data = bytes(self._fs.cat_file(self._path(name), start=begin, end=end))
        if len(data) != end - begin:
            raise TruncatedError(f"{self.url}/{name} ended at byte {begin + len(data)}, asked for {begin} to {end}")
        return data

    def _info(self, name: str) -> dict[str, Any]:
        try:
            look = partial(_head_s3 if _is_s3(self._fs) else _look, self._fs, self._path(name))
            info: dict[str, Any] = self._retried(f"look at {name}", look)
        except FileNotFoundError:
            info = {"type": "none"}
        if info["type"] != "file":
            raise SourceMissingError(f"{self.url}/{name} is not there")
        return info

    def _retried(self, doing: str, attempt: Callable[[], T]) -> T:
        """Try again what may pass, with doubling delays. FileNotFoundError passes through; raises StoreError at last."""
        delay = _FIRST_DELAY_SECONDS
        for left in reversed(range(_ATTEMPTS)):
            try:
                return attempt()
            except (FileNotFoundError, OrchestratorError):
                raise
            except Exception as error:
                if not left or not is_transient(error):
                    raise self._given_up(doing, error) from error
            self._sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_SECONDS)
        raise AssertionError("the last attempt returns or raises")

    def _given_up(self, doing: str, error: Exception) -> SourceCorruptError | StoreError:
        if isinstance(error, TruncatedError):
            return SourceCorruptError(str(error))
        return StoreError(
            f"cannot {doing} at {self.url}: {type(error).__name__}: {error}",
            "Check that the source's URL exists, that this machine reaches it, and that its credentials may read it.",
        )


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a moment later: what networks and busy servers cause."""
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS
    package = type(error).__module__.partition(".")[0]
    return package in _NETWORK_PACKAGES and type(error).__name__ not in _LASTING_ERRORS


def _client(url: str) -> Any:
    """A client of this process's own, which looks things up anew each time. Raises StoreError."""
    import fsspec

    options: dict[str, Any] = {}
    if not url.startswith("memory:"):  # its objects are the client's own
        options = {"skip_instance_cache": True, "use_listings_cache": False}
    if url.startswith(("s3:", "s3a:")):
        options["config_kwargs"] = {"max_pool_connections": 32, "connect_timeout": 10, "read_timeout": 60}
    try:
        return fsspec.url_to_fs(url, **options)[0]
    except (ImportError, ValueError) as error:
        raise StoreError(f"cannot open the source {url!r}: {error}", "Install the fsspec package of this scheme.") from None


def _identity(info: dict[str, Any]) -> str:
    """By content where the store knows it, else by what changes whenever that may have changed."""
    sha256 = _sha256(info)
    if sha256:
        return f"sha256:{sha256}"
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


def _is_s3(fs: Any) -> bool:
    return hasattr(fs, "_call_s3")


def _look(fs: Any, path: str) -> dict[str, Any]:
    found: dict[str, Any] = fs.info(path)
    return found


def _head_s3(fs: Any, path: str) -> dict[str, Any]:
    """As `info` of an object, with its checksum where the server keeps one. Raises FileNotFoundError, for a prefix too."""
    from fsspec.asyn import sync

    bucket, key, _ = fs.split_path(path)

    async def head() -> dict[str, Any]:
        found: dict[str, Any] = await fs._call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        return found

    answer: dict[str, Any] = sync(fs.loop, head)
    return {**answer, "type": "file", "size": answer["ContentLength"]}


def _get_s3(fs: Any, path: str, begin: int, end: int) -> tuple[bytes, str]:
    """A range of an object and its ETag, in one request."""
    from fsspec.asyn import sync

    bucket, key, _ = fs.split_path(path)

    async def get() -> tuple[bytes, str]:
        response = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={begin}-{end - 1}")
        async with response["Body"] as body:
            return await body.read(), str(response.get("ETag", "")).strip('"')

    found: tuple[bytes, str] = sync(fs.loop, get)
    return found


@dataclass
class Window:
    """Small planned ranges of a file that lie side by side: bytes [begin, end), fetched once."""

    begin: int
    end: int
    left: int
    """Planned bytes that nobody has asked for yet; at none the window is dropped."""
    data: bytes | None = None


def windows(planned: Iterable[PlannedRange]) -> dict[int, list[Window]]:
    """Windows of each file, in order, over the small ranges. No byte is in two of them, none that is not planned in any."""
    found: dict[int, list[Window]] = {}
    small = sorted({item for item in planned if 0 < item[2] - item[1] < SMALL_BYTES})
    for file, begin, end in small:
        mine = found.setdefault(file, [])
        last = mine[-1] if mine else None
        if last is not None and begin < last.end:
            last.left += max(end - last.end, 0)
            last.end = max(end, last.end)
        elif last is not None and begin == last.end and end - last.begin <= WINDOW_BYTES:
            last.left += end - begin
            last.end = end
        else:
            mine.append(Window(begin, end, end - begin))
    return found


class RemoteSource:
    """Objects opened on first use. Several threads may read at once."""

    def __init__(self, place: RemoteFolder, files: tuple[SourceFile, ...], planned: Iterable[PlannedRange] = ()) -> None:
        self._place, self._files = place, files
        self._windows = windows(planned)
        self._held = 0
        self._etags: dict[int, str] = {}
        """ETag of the version that is read, by number of the file."""
        self._lock = threading.RLock()
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

    def _check(self, file: int) -> None:
        with self._lock:
            if file in self._etags:
                return
            planned = self._files[file]
            found, etag = self._place.source_version(planned.name)
            check_unchanged(planned, found, self._place.url)
            self._etags[file] = etag

    def _from_window(self, file: int, offset: int, out: memoryview) -> bool:
        """Serve a read from the window that it lies in; False when there is none, or no room to hold it."""
        end = offset + len(out)
        with self._lock:
            mine = self._windows.get(file, [])
            position = bisect.bisect_right(mine, offset, key=lambda window: window.begin) - 1
            if position < 0 or end > mine[position].end:
                return False
            window = mine[position]
            if window.data is None:
                if window.left <= len(out) or self._held + window.end - window.begin > _HELD_BYTES:
                    mine.pop(position)  # the others of it are read alone as well: no byte is to be fetched twice
                    return False
                window.data = self._fetch(file, window.begin, min(window.end, self._files[file].num_bytes))
                self._held += len(window.data)
            piece = window.data[offset - window.begin : end - window.begin]
            window.left -= len(out)
            if window.left <= 0:
                self._held -= len(window.data)
                mine.pop(position)
        if len(piece) != len(out):
            raise SourceCorruptError(f"{self._place.url}/{self._files[file].name} ended at byte {offset + len(piece)}")
        out[:] = piece
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

    def _fetch(self, file: int, begin: int, end: int) -> bytes:
        planned = self._files[file]
        if end > planned.num_bytes:
            raise SourceCorruptError(
                f"{self._place.url}/{planned.name} ended at byte {planned.num_bytes}, asked for {begin} to {end}"
            )
        data = self._place.fetch(planned.name, begin, end, self._etags.get(file, ""))
        with self._lock:
            self.bytes_read += len(data)
        return data
