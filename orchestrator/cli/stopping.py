"""End a command on Ctrl-C (exit code 130) or SIGTERM (143) within seconds, whatever it is doing.

The signal raises Interrupted in the main thread, so that every block cleans up. That is not enough: native code that calls Python
swallows the exception, a library replaces the handler (as Ray does), or blocks where no exception is raised. So the kernel's
notice of the signal (Python's wakeup descriptor) also wakes a thread. It ends the process and its descendants when cleaning up
takes too long.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from orchestrator.base.errors import Interrupted, OrchestratorError, interruption
from orchestrator.work.process import end_descendants

GRACE_SECONDS = 4.0
"""Longest time for cleaning up; a command ends within five seconds."""
_REPORT_SECONDS = 0.3
_NOTICE_SECONDS = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stopping:
    """Stop signals of this process, from `install` on."""

    grace_seconds: float = GRACE_SECONDS
    report: Callable[[OrchestratorError], None] = lambda error: None
    """Shows the error of a command that does not end in time."""
    number: int = 0
    """First signal received; 0: none yet."""
    _raised: bool = False
    _before: dict[int, Any] = field(default_factory=dict)
    """Earlier handlers. Signals that were ignored, as under nohup, are not among them and stay ignored."""
    _noticed: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)
    _notify: int = -1

    def install(self) -> None:
        """Install the handlers. For the main thread."""
        found = {number: signal.getsignal(number) for number in _SIGNALS}
        self._before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
        notices, self._notify = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._notify, False)
        signal.set_wakeup_fd(self._notify, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(notices,), name="stopping", daemon=True).start()
        for number in self._before:
            signal.signal(number, self._interrupt)

    def uninstall(self) -> None:
        """Restore the earlier handlers."""
        self._over.set()
        signal.set_wakeup_fd(-1)
        os.close(self._notify)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def handled(self) -> frozenset[int]:
        """Return the signals that are not ignored."""
        return frozenset(self._before)

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        """Raise Interrupted once: a second signal must not interrupt the cleaning up."""
        self.number = self.number or number
        if not self._raised:
            self._raised = True
            raise Interrupted(self.number)

    def _watch(self, notices: int) -> None:
        """Wait for the first signal, and end the process if it takes too long afterwards."""
        with open(notices, "rb", buffering=0) as pipe:
            while (read := pipe.read(1)) and read[0] not in self._before:
                pass
        if read:
            self.number = self.number or read[0]
            self._noticed.set()
            if not self._over.wait(self.grace_seconds):
                self._end()

    def behind(self, error: BaseException) -> int:
        """Return the signal behind an error that ends a command; 0: no signal.

        A library's own handler may raise at once, a moment before the notice of the signal arrives.
        """
        if isinstance(error, SystemExit | KeyboardInterrupt) and not self.number:
            self._noticed.wait(_NOTICE_SECONDS)
        return self.number

    def finish(self) -> None:
        """Ignore signals from now on: during Python's shutdown they would end it with another exit code.

        Not with Ray loaded: its shutdown may hang and must stay stoppable.
        """
        if "ray" not in sys.modules:
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)

    def leave(self) -> NoReturn:
        """End the program after its cleaning up, and its descendants that still run.

        Skips the libraries' exit handlers: Ray's takes more seconds, and crashes after an interrupted start. MPI's runs, or the
        other ranks would count this one as lost.
        """
        code = interruption(self.number).exit_code
        if "mpi4py.MPI" in sys.modules:
            sys.exit(code)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        _end_now(code)

    def _end(self) -> NoReturn:
        error = interruption(self.number)
        reporting = threading.Thread(target=self.report, args=(error,), daemon=True)
        reporting.start()
        reporting.join(_REPORT_SECONDS)  # the reader of our output may be stuck
        _end_now(error.exit_code)


_current: Stopping | None = None


def install() -> Stopping:
    """Make this program stoppable, from its first lines to its end: the interpreter may hang after the last line."""
    global _current
    _current = Stopping()
    _current.install()
    atexit.register(_current.finish)  # registered first, so it runs last: the exit handlers of libraries can still be stopped
    return _current


@contextlib.contextmanager
def stoppable() -> Iterator[Stopping]:
    """Make the block stoppable, as a part of an enclosing stoppable block if there is one.

    Does nothing outside of the main thread, where Python has no signals.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Stopping()
        return
    stopping = _current = Stopping()
    stopping.install()
    try:
        yield stopping
    finally:
        _current = None
        stopping.uninstall()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep our signal handlers while a library in the block tries to replace them.

    Ray does when it starts. On SIGTERM it ends its processes at once, which aborts this one before it has cleaned up.
    """
    mine = _current.handled if _current is not None else frozenset[int]()
    original = signal.signal

    def take(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in mine else original(number, handler)

    signal.signal = take  # type: ignore[assignment]  # stricter where it is declared
    try:
        yield
    finally:
        signal.signal = original


def _end_now(code: int) -> NoReturn:
    """End this process and its descendants silently."""
    try:
        end_descendants()
    finally:
        os._exit(code)
