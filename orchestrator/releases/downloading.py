"""Files of a release on their way to this machine: several chunks in flight, each verified, resumed after a break.

A file grows under a temporary name beside its target, named by its digest, so that a later attempt finds it and fetches
only the chunks that are not right yet: there is no journal to trust. It gets its name when every chunk is right and on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.errors import DigestError, StoreFullError, store_error
from orchestrator.core.manifest import FileRecord
from orchestrator.stores import Store

CHUNKS_IN_FLIGHT = 8
_BLOCK_BYTES = 8 * 2**20
"""Read and written at a time: the memory of a pull is this, times the chunks in flight."""
_READS = 2
"""Times that a chunk is read before its bytes count as damaged in the store and not on their way."""
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file of a release and where it is to stand."""

    file: FileRecord
    target: Path


def download(store: Store, wanted: Iterable[Wanted], progress: Callable[[FileRecord], None]) -> None:
    """Bring every file to its target; one that is there already with the right bytes is kept.

    `progress` is called after each file. Raises DigestError for damaged bytes and StoreError; what was fetched until then is
    kept for the next attempt.
    """
    # Always in one order: two processes that fetch into one folder wait for each other and not both.
    files = [item for _, item in sorted({item.target: item for item in wanted}.items())]
    _check_room(files)
    with ThreadPoolExecutor(CHUNKS_IN_FLIGHT) as pool, contextlib.ExitStack() as stack:
        parts = []
        for item in files:
            part = None if _is_right(item, pool) else stack.enter_context(_Part(item))
            if part is None or part.is_done:
                progress(item.file)
            else:
                parts.append(part)
        for part in _fetched(store, parts, pool):
            part.finish()
            progress(part.file)


def _fetched(store: Store, parts: list[_Part], pool: ThreadPoolExecutor) -> Iterator[_Part]:
    """Each part when its last chunk is there. The first error ends it; chunks that have not begun are dropped."""
    stopped = threading.Event()
    missing = {part: part.num_chunks for part in parts}
    tasks = {pool.submit(part.fetch, store, number, stopped): part for part in parts for number in range(part.num_chunks)}
    try:
        yield from (part for part, count in missing.items() if not count)
        for task in as_completed(tasks):
            task.result()
            part = tasks[task]
            missing[part] -= 1
            if not missing[part]:
                yield part
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _is_right(item: Wanted, pool: ThreadPoolExecutor) -> bool:
    """Whether the target is there with the right bytes."""
    if not item.target.is_file() or item.target.stat().st_size != item.file.num_bytes:
        return False
    with item.target.open("rb") as file:
        numbers = range(len(item.file.chunks.sha256))
        return all(pool.map(lambda number: _stored_digest(file.fileno(), item.file, number) == _digest(item.file, number), numbers))


class _Part:
    """A file that is being fetched, locked against other processes that fetch the same one to the same place."""

    def __init__(self, item: Wanted) -> None:
        self.file, self._target = item.file, item.target
        self._path = item.target.with_name(f".{item.target.name}.{item.file.sha256[:_DIGITS]}.part")
        self._descriptor = -1
        self._is_new = True
        self._is_damaged = False
        self.num_chunks = len(item.file.chunks.sha256)
        self.is_done = False

    def __enter__(self) -> _Part:
        with self._writing():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            while self._descriptor < 0:
                self._is_new = not self._path.exists()
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                with contextlib.suppress(OSError):  # file systems without locks: two pulls into one folder are on their own
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                if not self._is_still_there():
                    self._close()  # whom we waited for has finished it
                    self.is_done = self._target.is_file()
                    if self.is_done:
                        return self
            os.ftruncate(self._descriptor, self.file.num_bytes)
            if self.file.num_bytes:
                with contextlib.suppress(OSError):  # no fallocate here: a full disk is met later
                    os.posix_fallocate(self._descriptor, 0, self.file.num_bytes)
        return self

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def fetch(self, store: Store, number: int, stopped: threading.Event) -> None:
        """Bring one chunk, unless an earlier attempt has."""
        if not self._is_new and _stored_digest(self._descriptor, self.file, number) == _digest(self.file, number):
            return
        for _ in range(_READS):
            if stopped.is_set() or self._copy(store, number, stopped) == _digest(self.file, number):
                return
        self._is_damaged = True
        begin, end = _bounds(self.file, number)
        raise DigestError(f"bytes {begin} to {end} of {self.file.path} in {store.url} are not those that were published")

    def _copy(self, store: Store, number: int, stopped: threading.Event) -> str:
        """Write the chunk as it comes; returns its sha256."""
        hasher = hashlib.sha256()
        begin, end = _bounds(self.file, number)
        for offset in range(begin, end, _BLOCK_BYTES):
            if stopped.is_set():
                break
            block = store.get_range(self.file.key, offset, min(offset + _BLOCK_BYTES, end))
            hasher.update(block)
            self._write(memoryview(block)[: end - offset], offset)
        return hasher.hexdigest()

    def _write(self, view: memoryview, offset: int) -> None:
        with self._writing():
            while len(view):
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def finish(self) -> None:
        """Every chunk is right: sync it and give it its name."""
        with self._writing():
            os.fsync(self._descriptor)
            self._path.replace(self._target)
            sync_folder(self._target.parent)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._close()
        if self._is_damaged:
            self._path.unlink(missing_ok=True)  # the store's bytes are wrong: nothing here is worth going on with

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise store_error(f"cannot write {self._target}", error) from error


def _digest(file: FileRecord, number: int) -> str:
    return file.chunks.sha256[number]


def _bounds(file: FileRecord, number: int) -> tuple[int, int]:
    begin = number * file.chunks.num_bytes
    return begin, min(begin + file.chunks.num_bytes, file.num_bytes)


def _stored_digest(descriptor: int, file: FileRecord, number: int) -> str:
    """sha256 of a chunk as it lies on this machine."""
    hasher = hashlib.sha256()
    begin, end = _bounds(file, number)
    for offset in range(begin, end, _BLOCK_BYTES):
        hasher.update(os.pread(descriptor, min(_BLOCK_BYTES, end - offset), offset))
    return hasher.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """A small file of our own, whole or not at all. Raises StoreError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise store_error(f"cannot write {path}", error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Names that were given in it survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_room(files: list[Wanted]) -> None:
    """Raises StoreError when what is not there yet cannot fit."""
    missing = [item for item in files if not item.target.exists()]
    needed = sum(item.file.num_bytes for item in missing)
    if not missing:
        return
    present = next(parent for parent in missing[0].target.resolve().parents if parent.exists())
    begun = sum(_blocks_bytes(part) for item in missing for part in item.target.parent.glob(".*.part"))
    free = shutil.disk_usage(present).free + begun
    if needed > free:
        raise StoreFullError(
            f"{present} has {free:,} bytes free, the files need {needed:,}", "Choose another --output, or fewer ranks."
        )


def _blocks_bytes(path: Path) -> int:
    """What a file takes on the disk; nothing once another pull has finished it and given it its name."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
