"""Hash a step's inputs before its outputs are kept: once per node, build and content.

Files of a folder store are read in place, so a flipped bit would go into an engine unseen. Threads hash them while the step reads
the same pages; an output gets its name only after that. Steps of one build on one node share results in a folder beside their
scratch folders, keyed by a file's device, inode, size, and times of modification and change. A file written to afterwards is
hashed again. Damage without a write, on the disk itself, changes none of these: the next build, which has new entries, finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from orchestrator.base.errors import DamagedOutputError
from orchestrator.base.locks import hold, remove_unheld
from orchestrator.planning.steps import Output

_THREADS = 4
_BLOCK_BYTES = 4 * 2**20
_NAME = "trt-orchestrator-checked-{uid}"


class InputChecks:
    """Checks of one attempt's inputs that are local files."""

    def __init__(self, root: str | Path | None = None, build_id: str = "") -> None:
        """Share results with attempts of the same build and scratch root; without both arguments, share nothing."""
        self._shared = (Path(root), build_id) if root is not None and build_id else None
        self._folder: tuple[Path, int] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._running: dict[str, Future[None]] = {}
        self._stopped = threading.Event()
        self.hashed_bytes = 0
        self.waited_seconds = 0.0

    def begin(self, output: Output, path: Path) -> None:
        """Start to hash a file that a step is going to read."""
        if self._pool is None:
            self._folder = _open_folder(*self._shared) if self._shared else None
            self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "check")
        if output.key not in self._running:
            self._running[output.key] = self._pool.submit(self._check, output, path)

    def settle(self) -> None:
        """Wait for every hash. Raises DamagedOutputError for the first input that is gone or differs from its commit."""
        began = time.monotonic()
        try:
            for job in self._running.values():
                job.result()
        finally:
            self.waited_seconds += time.monotonic() - began

    def close(self) -> None:
        """Stop the hashes that still run."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._folder is not None:
            os.close(self._folder[1])
            self._folder = None

    def _check(self, output: Output, path: Path) -> None:
        try:
            with path.open("rb", buffering=0) as file, self._entry(os.fstat(file.fileno()), output) as entry:
                if entry is not None and os.fstat(entry).st_size:
                    return
                before = _state(os.fstat(file.fileno()))
                found = self._sha256(file.fileno())
                if found is None:
                    return
                if found != output.sha256:
                    raise DamagedOutputError(
                        f"{output.key} is not what was written: sha256 {found}, expected {output.sha256}", key=output.key
                    )
                if entry is not None and _state(os.fstat(file.fileno())) == before:
                    os.write(entry, b"1")
        except FileNotFoundError:
            raise DamagedOutputError(f"{output.key} is gone", key=output.key) from None
        except OSError as error:
            raise DamagedOutputError(f"{output.key} cannot be read: {error.strerror}", key=output.key) from error

    def _sha256(self, file: int) -> str | None:
        """Return the sha256 of the whole file; None when stopped."""
        hasher, buffer = hashlib.sha256(), bytearray(_BLOCK_BYTES)
        view = memoryview(buffer)
        while count := os.readv(file, [buffer]):
            hasher.update(view[:count])
            self.hashed_bytes += count
            if self._stopped.is_set():
                return None
        return hasher.hexdigest()

    @contextlib.contextmanager
    def _entry(self, found: os.stat_result, output: Output) -> Iterator[int | None]:
        """Open and lock the node's entry of a file: a second step waits for the first one's hash. None: nothing can be shared."""
        if self._folder is None:
            yield None
            return
        name = hashlib.sha256(f"{output.sha256}:{_state(found)}".encode()).hexdigest()
        try:
            entry = os.open(self._folder[0] / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield None
            return
        try:
            with contextlib.suppress(OSError):  # a file system without locks: hashed twice at worst
                fcntl.flock(entry, fcntl.LOCK_EX)
            yield entry
        finally:
            os.close(entry)


def _state(found: os.stat_result) -> tuple[int, ...]:
    """Return the file's identity, which changes with every write: the time of change cannot be set back."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def forget(root: str | Path, build_id: str) -> None:
    """Remove this machine's entries of a build that has ended. Never raises."""
    top = Path(root) / _NAME.format(uid=os.geteuid())
    shutil.rmtree(top / build_id, ignore_errors=True)
    with contextlib.suppress(OSError):
        top.rmdir()


def _open_folder(root: Path, build_id: str) -> tuple[Path, int] | None:
    """Open this node's entries of one build, locked while open, and remove unlocked entries of other builds.

    None when the folder may not be this user's alone: entries are trusted.
    """
    top = root / _NAME.format(uid=os.geteuid())
    try:
        top.mkdir(mode=0o700, exist_ok=True)
        found = top.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            return None
        folder = top / build_id
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = hold(folder)
    except OSError:
        return None
    for other in top.iterdir():
        if other != folder:
            remove_unheld(other)  # a build between two steps may lose its entries and hash again
    return folder, lock
