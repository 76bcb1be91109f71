"""Download files of a release: fetched in blocks, each chunk and the whole verified, resumed after a break.

A file grows under a temporary name beside its target. The name holds the digest, so a later attempt finds the file and fetches only
chunks that are not right yet; no journal needs to be trusted. The file gets its name once its length, every chunk and the whole
digest are right and it is on disk. Bytes are hashed in order as they arrive, so nothing is read twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from orchestrator.base.errors import DigestError, StoreFullError
from orchestrator.releases.folders import OutputFolder, Spot, writing
from orchestrator.releases.manifest import FileRecord
from orchestrator.releases.transfers import Listener
from orchestrator.stores.store import Store

FILES_AT_ONCE = 4
"""Files downloaded at once: sha256 of a whole file is sequential, so a single file is limited by one core."""
BLOCKS_IN_FLIGHT = 8
_BLOCK_BYTES = 8 * 2**20
"""Size of a read and write. A pull's memory is this times the blocks in flight, plus a few."""
_READS = 2
"""Reads of a chunk before its bytes count as damaged in the store, not on their way."""
_DIGITS = 16
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file of a release and its checked path below the output folder."""

    file: FileRecord
    place: str


class _StoppedError(Exception):
    """Raised when another file has failed."""


def download(store: Store, wanted: Iterable[Wanted], output: OutputFolder, listener: Listener) -> None:
    """Download every file to its place; a file that already has the right bytes is kept.

    Raises DigestError for damaged bytes, and StoreError. Chunks fetched until then are kept for the next attempt.
    """
    # Always in one order, so that two processes that fetch into one folder cannot wait for each other.
    items = [item for _, item in sorted({item.place: item for item in wanted}.items())]
    listener.on_begin(len(items), sum(item.file.num_bytes for item in items))
    _check_room(items, output)
    at_once = max(1, min(FILES_AT_ONCE, len(items)))
    with ThreadPoolExecutor(BLOCKS_IN_FLIGHT) as pool, ThreadPoolExecutor(at_once) as files:
        fetching = _Fetching(store, pool, max(1, BLOCKS_IN_FLIGHT // at_once), threading.Event(), listener)
        tasks = [files.submit(_bring, fetching, item, output.spot(item.place)) for item in items]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            fetching.stopped.set()
            files.shutdown(cancel_futures=True)
    for task in tasks:
        if not task.cancelled() and not isinstance(task.exception(), _StoppedError):
            task.result()


@dataclass(frozen=True, slots=True)
class _Fetching:
    """State that all files of a pull share."""

    store: Store
    pool: ThreadPoolExecutor
    ahead: int
    """Blocks of one file that are fetched ahead."""
    stopped: threading.Event
    listener: Listener


def _bring(fetching: _Fetching, item: Wanted, target: Spot) -> None:
    if fetching.stopped.is_set():
        raise _StoppedError
    if _is_right(item.file, target):
        fetching.listener.on_bytes(item.file.num_bytes)
    else:
        with _Part(fetching, item.file, target) as part:
            if part.is_done:
                fetching.listener.on_bytes(item.file.num_bytes)
            else:
                part.fill()
    fetching.listener.on_file(item.file)


def _is_right(file: FileRecord, target: Spot) -> bool:
    """Whether the file itself, not a link, exists with the right bytes."""
    with writing(target.path):
        descriptor = target.open()
        if descriptor is None:
            return False
        try:
            if os.fstat(descriptor).st_size != file.num_bytes:
                return False
            whole = hashlib.sha256()
            chunks = range(len(file.chunks.sha256))
            return all(_take_stored(descriptor, file, number, whole) for number in chunks) and whole.hexdigest() == file.sha256
        finally:
            os.close(descriptor)


def _take_stored(descriptor: int, file: FileRecord, number: int, whole: hashlib._Hash) -> bool:
    """Feed a local chunk to `whole`; False when it is wrong."""
    hasher = hashlib.sha256()
    for offset, end in _blocks(*_bounds(file, number)):
        block = os.pread(descriptor, end - offset, offset)
        hasher.update(block)
        whole.update(block)
    return hasher.hexdigest() == file.chunks.sha256[number]


class _Part:
    """A file being fetched, locked against other processes that fetch it to the same place."""

    def __init__(self, fetching: _Fetching, file: FileRecord, target: Spot) -> None:
        self._fetching, self._file, self._target = fetching, file, target
        self._own = _part_of(file, target)
        self._descriptor = -1
        self._is_new = True
        self._is_damaged = False
        self.is_done = False
        """True: another process has finished the file while this one waited."""

    def __enter__(self) -> _Part:
        with writing(self._target.path):
            while self._descriptor < 0:
                self._descriptor, self._is_new = self._own.open_own()
                try:
                    self._lock()
                except BaseException:
                    self._close()
                    raise
                if not self._is_still_there():
                    self._close()
                    self.is_done = _is_right(self._file, self._target)
                    if self.is_done:
                        return self
            os.ftruncate(self._descriptor, self._file.num_bytes)
            if self._file.num_bytes:
                with contextlib.suppress(OSError):  # no fallocate here: a full disk shows up later
                    os.posix_fallocate(self._descriptor, 0, self._file.num_bytes)
        return self

    def _lock(self) -> None:
        """Wait until no other process holds the lock. Polls, because a thread that waits in the kernel cannot be stopped."""
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._fetching.stopped.wait(_POLL_SECONDS):
                    raise _StoppedError from None
            except OSError:  # a file system without locks: two pulls into one folder are not protected
                return

    def _is_still_there(self) -> bool:
        found = self._own.stat()
        return found is not None and os.path.samestat(found, os.fstat(self._descriptor))

    def fill(self) -> None:
        """Fetch missing chunks, check everything, and give the file its name."""
        file, store = self._file, self._fetching.store
        size = store.size(file.key)
        if size is not None and size != file.num_bytes:
            raise self._damaged(f"{file.path} in {store.url} has {size:,} bytes, published were {file.num_bytes:,}")
        whole = hashlib.sha256()
        # A new file is fetched in one stream; of a begun file, every chunk is checked first.
        with contextlib.closing(self._blocks([(0, file.num_bytes)] if self._is_new else [])) as stream:
            for number in range(len(file.chunks.sha256)):
                whole = self._stored(number, whole) or self._fetched(number, whole, stream)
                begin, end = _bounds(file, number)
                self._fetching.listener.on_bytes(end - begin)
        if whole.hexdigest() != file.sha256:
            raise self._damaged(f"{file.path} in {store.url} has sha256 {whole.hexdigest()}, published was {file.sha256}")
        with writing(self._target.path):
            os.fsync(self._descriptor)
            self._own.move_to(self._target)

    def _stored(self, number: int, whole: hashlib._Hash) -> hashlib._Hash | None:
        """Return `whole` with a chunk that an earlier attempt fetched; None when the chunk is not right."""
        after = whole.copy()
        return after if not self._is_new and _take_stored(self._descriptor, self._file, number, after) else None

    def _fetched(self, number: int, whole: hashlib._Hash, stream: Iterator[tuple[int, bytes]]) -> hashlib._Hash:
        """Return `whole` with a chunk from the store, the next of `stream` or fetched separately. Raises DigestError."""
        begin, end = _bounds(self._file, number)
        for attempt in range(_READS):
            after, hasher = whole.copy(), hashlib.sha256()
            with contextlib.ExitStack() as stack:
                is_next = self._is_new and not attempt
                blocks = stream if is_next else stack.enter_context(contextlib.closing(self._blocks([(begin, end)])))
                for offset, block in itertools.islice(blocks, len(_blocks(begin, end))):
                    hasher.update(block)
                    after.update(block)
                    self._write(block, offset)
            if hasher.hexdigest() == self._file.chunks.sha256[number]:
                return after
        where = f"{self._file.path} in {self._fetching.store.url}"
        raise self._damaged(f"bytes {begin} to {end} of {where} differ from those that were published")

    def _blocks(self, spans: Sequence[tuple[int, int]]) -> Generator[tuple[int, bytes]]:
        """Yield the blocks of these ranges in order, several fetched ahead. Closing it writes the blocks that have arrived."""
        store, pool, stopped = self._fetching.store, self._fetching.pool, self._fetching.stopped
        chunk_bytes = self._file.chunks.num_bytes
        coming = (
            block
            for first, last in spans
            for begin in range(first, last, chunk_bytes)
            for block in _blocks(begin, min(begin + chunk_bytes, last))
        )
        begun: deque[tuple[int, Future[bytes]]] = deque()
        try:
            while True:
                for begin, end in itertools.islice(coming, self._fetching.ahead - len(begun)):
                    begun.append((begin, pool.submit(store.get_range, self._file.key, begin, end)))
                if not begun:
                    return
                offset, task = begun[0]
                block = task.result()
                if stopped.is_set():
                    raise _StoppedError
                begun.popleft()
                yield offset, block
        finally:
            for offset, task in begun:
                if not task.cancel():
                    with contextlib.suppress(Exception):  # the reason for the end matters more
                        self._write(task.result(), offset)

    def _write(self, block: bytes, offset: int) -> None:
        view = memoryview(block)[: max(self._file.num_bytes - offset, 0)]
        with writing(self._target.path):
            while len(view):
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def _damaged(self, problem: str) -> DigestError:
        """Stop all files and return the error: bytes of the store are wrong, so the pull cannot succeed."""
        self._is_damaged = True
        return DigestError(problem)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._close()
        if self._is_damaged:
            self._own.unlink()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _bounds(file: FileRecord, number: int) -> tuple[int, int]:
    begin = number * file.chunks.num_bytes
    return begin, min(begin + file.chunks.num_bytes, file.num_bytes)


def _blocks(begin: int, end: int) -> list[tuple[int, int]]:
    """Split [begin, end) into reads of at most a block."""
    return [(offset, min(offset + _BLOCK_BYTES, end)) for offset in range(begin, end, _BLOCK_BYTES)]


def _check_room(items: list[Wanted], output: OutputFolder) -> None:
    """Check the space for missing files. Raises StoreError."""
    missing = [item for item in items if output.spot(item.place).stat() is None]
    needed = sum(item.file.num_bytes for item in missing)
    free = output.free_bytes() + sum(_begun_bytes(item, output) for item in missing)
    if needed > free:
        raise StoreFullError(
            f"{output.path} has {free:,} bytes free, the files need {needed:,}", "Choose another --output, or fewer ranks."
        )


def _begun_bytes(item: Wanted, output: OutputFolder) -> int:
    """Return the bytes on disk that an earlier attempt left of a file."""
    found = _part_of(item.file, output.spot(item.place)).stat()
    return found.st_blocks * 512 if found else 0


def _part_of(file: FileRecord, target: Spot) -> Spot:
    return target.beside(f".{target.name}.{file.sha256[:_DIGITS]}.part")
