"""What a driver says of its build: events, as values here, as JSON lines to anywhere else, and read back there.

Knows the lines of `orchestrator build --json` and nothing of how they came here: a job's log, a pod's, objects of a store, or a
file. Other lines (libraries' warnings, tracebacks) are passed over; so are events of a newer driver. Every line has its time, and
that of a step its kind, its rank or stage, and the node and number of its attempt.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ValidationError

from orchestrator.base.errors import DriverLostError, OrchestratorError, StepFailedError, TerminatedError, error_classes
from orchestrator.events.nodes import NodeFacts
from orchestrator.events.steps import EVENT, AnyEvent, StepFailed, StepProgress, StepStarted, StepSucceeded

_TAIL_LINES, _TAIL_CHARACTERS = 20, 2000


def _at() -> float:
    """Seconds since 1970; 0: not known. It says nothing of what happened, so two events that differ in it are equal."""
    return field(default=0.0, compare=False)


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
    estimates: tuple[float, ...] = ()
    """Seconds of each pending step as the plan guesses them; empty: a driver that does not say."""
    release: str = ""
    """Name and version that it is going to publish, with a '/' between."""
    at: float = _at()


@dataclass(frozen=True, slots=True)
class NodesSeen:
    """What the nodes have, before the first step; a cluster that is one machine alone says nothing."""

    nodes: tuple[NodeFacts, ...]
    warnings: tuple[str, ...] = ()
    at: float = _at()


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step began, came on, succeeded or failed."""

    step: str
    """Its name; its digest where the driver says none."""
    event: AnyEvent
    node: str = field(default="", compare=False)
    """Of the attempt."""
    attempt: int = field(default=0, compare=False)
    at: float = _at()


@dataclass(frozen=True, slots=True)
class Retrying:
    """A step is going to be tried again."""

    step: str
    digest: str
    attempt: int
    delay_seconds: float
    at: float = _at()


@dataclass(frozen=True, slots=True)
class Finished:
    """No step is left to run."""

    ran: tuple[str, ...]
    """Names of the steps that ran in this build."""
    at: float = _at()


@dataclass(frozen=True, slots=True)
class Alive:
    """The driver has nothing to say, and is there."""

    at: float = _at()


@dataclass(frozen=True, slots=True)
class Published:
    """The last word of a build that came to its end."""

    manifest: str
    """URL of the release's manifest.json."""
    steps_run: int | None
    """Steps that this driver ran; others were committed before. None: not known, its log is lost."""
    verification: dict[str, Any] | None
    """The numbers of the manifest; None: switched off in the spec."""
    at: float = _at()


@dataclass(frozen=True, slots=True)
class Errored:
    """The last word of a build that failed or was stopped."""

    error: str
    """Name of its class."""
    message: str
    advice: str
    exit_code: int
    at: float = _at()

    @staticmethod
    def of(error: OrchestratorError, at: float = 0.0) -> Errored:
        return Errored(type(error).__name__, error.message, error.advice, error.exit_code, at)

    def to_error(self) -> OrchestratorError:
        """The error as the driver raised it; of a class that is not known here, one with its exit code."""
        cls = error_classes().get(self.error)
        if cls is not None:
            return cls(self.message, self.advice)
        made = StepFailedError(f"{self.error}: {self.message}", self.advice)
        made.exit_code = self.exit_code  # type: ignore[misc]  # this one instance speaks for a newer driver's class
        return made


BuildEvent = Planned | NodesSeen | Stepped | Retrying | Finished | Alive | Published | Errored


def place_of(step: str) -> dict[str, Any]:
    """Kind, rank and stage of a step, from its name, e.g. build/rank3 or convert/stage0/group1; None where it has none."""
    rank, stage = re.search(r"/rank(\d+)", step), re.search(r"/(?:stage|part)(\d+)", step)
    return {
        "kind": step.partition("/")[0],
        "rank": int(rank.group(1)) if rank else None,
        "stage": int(stage.group(1)) if stage else None,
    }


def encode_line(event: BuildEvent) -> str:
    """One line of JSON, without its newline; `decode_line` reads it back."""
    plain = {name: value for name, value in asdict(event).items() if name not in ("at", "event")}
    if isinstance(event, Stepped):
        plain |= {**place_of(event.step), **event.event.model_dump(mode="json", exclude={"type"})}
    elif isinstance(event, Retrying):
        plain |= place_of(event.step)
    elif isinstance(event, NodesSeen):
        plain["nodes"] = [node.model_dump(mode="json") for node in event.nodes]
    elif isinstance(event, Planned):
        plain["steps"] = plain.pop("num_steps")
    name = event.event.type if isinstance(event, Stepped) else _NAMES[type(event)]
    return json.dumps({"event": name, "time": _time(event.at), **plain})


_NAMES: dict[type, str] = {
    Planned: "plan", NodesSeen: "nodes", Retrying: "retry", Finished: "finish", Alive: "alive", Published: "published",
    Errored: "error",
}  # fmt: skip


def _time(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")


def decode_line(line: str) -> BuildEvent | None:
    """The event that a line tells; None when it tells none."""
    if not line.startswith("{"):
        return None
    try:
        fields = json.loads(line)
        decoder = _DECODERS.get(fields.pop("event"))
        if decoder is None:
            return None
        time = fields.pop("time", None)
        fields["told_at"] = datetime.datetime.fromisoformat(time).timestamp() if time else 0.0
        return decoder(fields)
    except (ValueError, KeyError, TypeError, ValidationError):
        return None


def _planned(fields: dict[str, Any]) -> Planned:
    return Planned(
        fields["steps"], tuple(fields["pending"]), fields["build_key"], fields["already_published"],
        tuple(fields.get("warnings", ())), tuple(fields.get("notes", ())), tuple(fields.get("estimates", ())),
        fields.get("release", ""), fields["told_at"],
    )  # fmt: skip


def _stepped(kind: str, model: type[AnyEvent]) -> Callable[[dict[str, Any]], Stepped]:
    def decode(fields: dict[str, Any]) -> Stepped:
        own = {name: fields[name] for name in model.model_fields if name in fields}
        name = fields.get("step") or fields["digest"]
        event = EVENT.validate_python({**own, "type": kind})
        return Stepped(name, event, fields.get("node", ""), fields.get("attempt", 0), fields["told_at"])

    return decode


def _retrying(fields: dict[str, Any]) -> Retrying:
    name = fields.get("step") or fields["digest"]
    return Retrying(name, fields["digest"], fields["attempt"], fields["delay_seconds"], fields["told_at"])


def _nodes(fields: dict[str, Any]) -> NodesSeen:
    nodes = tuple(NodeFacts.model_validate(node) for node in fields["nodes"])
    return NodesSeen(nodes, tuple(fields.get("warnings", ())), fields["told_at"])


def _published(fields: dict[str, Any]) -> Published:
    return Published(fields["manifest"], fields["steps_run"], fields.get("verification"), fields["told_at"])


def _errored(fields: dict[str, Any]) -> Errored:
    return Errored(fields["error"], fields["message"], fields.get("advice", ""), fields["exit_code"], fields["told_at"])


_STEP_EVENTS: dict[str, type[AnyEvent]] = {
    "started": StepStarted, "progress": StepProgress, "succeeded": StepSucceeded, "failed": StepFailed,
}  # fmt: skip
_DECODERS: dict[str, Callable[[dict[str, Any]], BuildEvent]] = {
    "plan": _planned,
    "nodes": _nodes,
    **{kind: _stepped(kind, model) for kind, model in _STEP_EVENTS.items()},
    "retry": _retrying,
    "finish": lambda fields: Finished(tuple(fields["ran"]), fields["told_at"]),
    "alive": lambda fields: Alive(fields["told_at"]),
    "published": _published,
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
    """Outcome of the build of an ended driver. Raises the build's own error, TerminatedError, or DriverLostError with `reason`."""
    if isinstance(last_word, Published):
        return last_word
    if last_word is not None:
        raise last_word.to_error()
    if stopped:
        raise TerminatedError(f"{where} was stopped")
    raise DriverLostError(f"{where} ended without a last word" + (f": {reason}" if reason else ""))
