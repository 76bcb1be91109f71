"""Events of a build as JSON lines in its store while it runs, so that it can be watched from anywhere.

    events/<build key>/<run>/<number>.jsonl     number from 000000; run begins with the time, so the last one is the newest

Objects cannot be appended to, so about every second the new lines become the next numbered object; in a long build less often. A
store that does not answer costs the build nothing: lines wait, and only the newest progress of each step is kept.
"""

from __future__ import annotations

import datetime
import itertools
import signal
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Self

from orchestrator.base.errors import OrchestratorError, StepFailedError, interruption
from orchestrator.events import Errored, Event, Heartbeat, Published, StepProgressed, encode_line
from orchestrator.scheduling.commits import EVENTS
from orchestrator.stores.store import Store

HEARTBEAT_SECONDS = 30.0
"""Heartbeat interval of an idle driver."""
_LEAST_SECONDS, _MOST_SECONDS, _SEGMENTS = 1.0, 15.0, 300
"""Seconds between two objects: the time since the build began / _SEGMENTS, within these limits."""
_MAX_LINES = 20_000
_CLOSE_SECONDS = 15.0


def new_run(build_key: str, at: float) -> str:
    """Return the key prefix of a run's events, with a trailing '/'."""
    began = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return f"{EVENTS}{build_key}/{began:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}/"


def segment_key(run: str, number: int) -> str:
    """Return the key of an object of a run."""
    return f"{run}{number:06d}.jsonl"


class Journal:
    """Events of one run. As a context manager, adds the error that ends the block, unless `tell` got a final event."""

    def __init__(self, store: Store, build_key: str, clock: Callable[[], float] = time.time) -> None:
        self.run = new_run(build_key, clock())
        self._store = store
        self._clock = clock
        self._began = self._written = clock()
        self._lines: dict[object, str] = {}
        """Lines in order; of each step's progress only the newest."""
        self._count = itertools.count()
        self._number = 0
        self._pending: bytes | None = None
        """The next object until the store has accepted it. It never changes, because a reader may have seen it already."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._ended = False
        self._writer = threading.Thread(target=self._work, name="journal", daemon=True)

    def tell(self, event: Event) -> None:
        """Queue an event; returns at once."""
        line = encode_line(event)
        key: object = ("progress", event.step) if isinstance(event, StepProgressed) else next(self._count)
        with self._lock:
            self._ended = self._ended or isinstance(event, Published | Errored)
            self._lines.pop(key, None)
            self._lines[key] = line
            if len(self._lines) > _MAX_LINES:
                del self._lines[next(iter(self._lines))]

    def __enter__(self) -> Self:
        self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None and not self._ended:
            self.tell(Errored.of(_as_ours(error)))
        self._closed = True
        self._wake.set()
        self._writer.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait(min(max(_LEAST_SECONDS, (self._clock() - self._began) / _SEGMENTS), _MOST_SECONDS))
            self.flush()
        self.flush()

    def flush(self) -> None:
        """Write the new lines. The next call repeats what the store refuses."""
        if self._pending is not None and not self._put():
            return
        with self._lock:
            lines, self._lines = list(self._lines.values()), {}
        if not lines and self._clock() - self._written >= HEARTBEAT_SECONDS:
            lines = [encode_line(Heartbeat(time=self._clock()))]
        if lines:
            self._pending = ("\n".join(lines) + "\n").encode()
            self._put()

    def _put(self) -> bool:
        assert self._pending is not None
        try:
            self._store.put(segment_key(self.run, self._number), self._pending)
        except Exception:  # of any library: watchers may wait, but the build must not fail
            return False
        self._pending, self._written = None, self._clock()
        self._number += 1
        return True


def _as_ours(error: BaseException) -> OrchestratorError:
    """Return an error as the command line reports it."""
    if isinstance(error, OrchestratorError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return interruption(getattr(error, "number", signal.SIGINT))
    return StepFailedError(f"{type(error).__name__}: {error}", "This is a bug: report it.")
