"""A build that runs elsewhere, read from what its driver prints: JSON lines become events, a result, or its own error again.

Knows the lines of `orchestrator build --json` and nothing of how they came here: a job's log, a pod's, or a file. Other lines
(libraries' warnings, tracebacks) are passed over; so are events of a newer driver.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from orchestrator.clusters import AnyEvent
from orchestrator.core.errors import CancelledError, DriverLostError, OrchestratorError, StepFailedError, error_classes
from orchestrator.core.progress import EVENT

_TAIL_LINES, _TAIL_CHARACTERS = 20, 2000


@dataclass(frozen=True, slots=True)
class Planned:
    """The driver has made its plan and knows what is to do."""

    num_steps: int
    pending: tuple[str, ...]
    """Names of the steps to run, e.g. convert/stage0/group0; what stands before the first '/' is their kind."""
    build_key: str
    already_published: bool
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step began, came on, succeeded or failed."""

    step: str
    """Its name; its digest where the driver says none."""
    event: AnyEvent


@dataclass(frozen=True, slots=True)
class Retrying:
    """A step is going to be tried again."""

    step: str
    digest: str
    attempt: int
    delay_seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """No step is left to run."""

    ran: tuple[str, ...]
    """Names of the steps that ran in this build."""


@dataclass(frozen=True, slots=True)
class Published:
    """The last word of a build that came to its end."""

    manifest: str
    """URL of the release's manifest.json."""
    steps_run: int | None
    """Steps that this driver ran; others were committed before. None: not known, its log is lost."""
    verification: dict[str, Any] | None
    """The numbers of the manifest; None: switched off in the spec."""


@dataclass(frozen=True, slots=True)
class Errored:
    """The last word of a build that failed or was stopped."""

    error: str
    """Name of its class."""
    message: str
    advice: str
    exit_code: int

    def to_error(self) -> OrchestratorError:
        """The error as the driver raised it; of a class that is not known here, one with its exit code."""
        cls = error_classes().get(self.error)
        if cls is not None:
            return cls(self.message, self.advice)
        made = StepFailedError(f"{self.error}: {self.message}", self.advice)
        made.exit_code = self.exit_code  # type: ignore[misc]  # this one instance speaks for a newer driver's class
        return made


BuildEvent = Planned | Stepped | Retrying | Finished | Published | Errored


def decode_line(line: str) -> BuildEvent | None:
    """The event that a line tells; None when it tells none."""
    if not line.startswith("{"):
        return None
    try:
        fields = json.loads(line)
        decoder = _DECODERS.get(fields.pop("event"))
        return decoder(fields) if decoder else None
    except (ValueError, KeyError, TypeError, ValidationError):
        return None


def _planned(fields: dict[str, Any]) -> Planned:
    return Planned(
        fields["steps"], tuple(fields["pending"]), fields["build_key"], fields["already_published"],
        tuple(fields.get("warnings", ())), tuple(fields.get("notes", ())),
    )  # fmt: skip


def _stepped(kind: str) -> Callable[[dict[str, Any]], Stepped]:
    def decode(fields: dict[str, Any]) -> Stepped:
        name = fields.pop("step", None) or fields["digest"]
        return Stepped(name, EVENT.validate_python({"type": kind, **fields}))

    return decode


def _retrying(fields: dict[str, Any]) -> Retrying:
    return Retrying(fields.get("step") or fields["digest"], fields["digest"], fields["attempt"], fields["delay_seconds"])


def _errored(fields: dict[str, Any]) -> Errored:
    return Errored(fields["error"], fields["message"], fields.get("advice", ""), fields["exit_code"])


_DECODERS: dict[str, Callable[[dict[str, Any]], BuildEvent]] = {
    "plan": _planned,
    **{kind: _stepped(kind) for kind in ("started", "progress", "succeeded", "failed")},
    "retry": _retrying,
    "finish": lambda fields: Finished(tuple(fields["ran"])),
    "published": lambda fields: Published(fields["manifest"], fields["steps_run"], fields.get("verification")),
    "error": _errored,
}


class LogReader:
    """A log that grows, read in pieces of any size; keeps what its end means for the build."""

    def __init__(self) -> None:
        self.last_word: Published | Errored | None = None
        self._begun = ""
        self._read = 0
        self._tail = ""

    def feed(self, text: str) -> list[BuildEvent]:
        """The events of the lines that `text` completes; a line that it begins waits for the next piece."""
        self._tail = (self._tail + text)[-_TAIL_CHARACTERS:]
        *lines, self._begun = (self._begun + text).split("\n")
        found = [event for line in lines if (event := decode_line(line)) is not None]
        for event in found:
            if isinstance(event, (Published, Errored)):
                self.last_word = event
        return found

    def feed_whole(self, text: str) -> list[BuildEvent]:
        """As `feed`, for a source that always gives the whole log; a shorter one than before gives nothing new."""
        new, self._read = text[self._read :], max(self._read, len(text))
        return self.feed(new)

    def close(self) -> list[BuildEvent]:
        """The event of a last line without a newline."""
        return self.feed("\n") if self._begun else []

    @property
    def tail(self) -> str:
        """The last lines that are no events, for people: why a driver died without a last word."""
        lines = self._tail.splitlines()[len(self._tail) == _TAIL_CHARACTERS :]  # the first may have lost its beginning
        plain = [line for line in lines if line.strip() and not line.startswith("{")]
        return "\n".join(plain[-_TAIL_LINES:])


def conclude(last_word: Published | Errored | None, *, stopped: bool, where: str, reason: str = "") -> Published:
    """What an ended driver's build came to. Raises the build's own error, CancelledError, or DriverLostError with `reason`."""
    if isinstance(last_word, Published):
        return last_word
    if last_word is not None:
        raise last_word.to_error()
    if stopped:
        raise CancelledError(f"{where} was stopped")
    raise DriverLostError(f"{where} ended without a last word" + (f": {reason}" if reason else ""))
