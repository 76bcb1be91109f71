"""Read the log of a driver while it grows: its events, and how its build ended."""

from __future__ import annotations

from orchestrator.base.errors import DriverLostError, TerminatedError
from orchestrator.events import Errored, Event, Published, decode_line

_TAIL_LINES, _TAIL_CHARACTERS = 20, 2000


class LogReader:
    """A growing log, read in pieces of any size. Keeps the build's final event."""

    def __init__(self) -> None:
        self.last_word: Published | Errored | None = None
        self._begun = ""
        self._tail = ""

    def feed(self, text: str) -> list[Event]:
        """Return the events of the lines that `text` completes; an incomplete line waits for the next piece."""
        self._tail = (self._tail + text)[-_TAIL_CHARACTERS:]
        *lines, self._begun = (self._begun + text).split("\n")
        found = [event for line in lines if (event := decode_line(line)) is not None]
        for event in found:
            if isinstance(event, (Published, Errored)):
                self.last_word = event
        return found

    def close(self) -> list[Event]:
        """Return the event of a last line without a newline."""
        return self.feed("\n") if self._begun else []

    @property
    def tail(self) -> str:
        """The last lines without events, for people: why a driver died without a final event."""
        lines = self._tail.splitlines()[len(self._tail) == _TAIL_CHARACTERS :]  # the first line may be incomplete
        plain = [line for line in lines if line.strip() and not line.startswith("{")]
        return "\n".join(plain[-_TAIL_LINES:])


def conclude(last_word: Published | Errored | None, *, stopped: bool, where: str, reason: str = "") -> Published:
    """Return the result of an ended driver. Raises the build's own error, TerminatedError, or DriverLostError with `reason`."""
    if isinstance(last_word, Published):
        return last_word
    if last_word is not None:
        raise last_word.to_error()
    if stopped:
        raise TerminatedError(f"{where} was stopped")
    raise DriverLostError(f"{where} ended without a result" + (f": {reason}" if reason else ""))
