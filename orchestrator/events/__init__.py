"""Events of a build: one union, and its JSON, one object per line, as `orchestrator build --json` prints it.

A worker sends the events of its step to the driver, and the driver notifies listeners of these and its own. A reader skips other
lines (warnings of libraries, tracebacks), unknown events and unknown fields.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, computed_field

from orchestrator.base.errors import OrchestratorError, StepFailedError, error_classes
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.steps import Failure, Outcome, Step

if TYPE_CHECKING:
    from orchestrator.planning.plan import Plan


def _seconds(value: Any) -> Any:
    return datetime.datetime.fromisoformat(value).timestamp() if isinstance(value, str) else value


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def _encodable(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


Moment = Annotated[float, BeforeValidator(_seconds), PlainSerializer(_iso)]
"""Seconds since 1970; ISO 8601 in JSON."""
Words = Annotated[str, BeforeValidator(_encodable)]
"""Text for people. File names need not be valid text: their other bytes are escaped."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    event: str
    """Name of the kind of event."""
    time: Moment = Field(default_factory=time.time)
    """Time of the event, on the clock of the process that wrote it."""


class Planned(_Event):
    """The driver has made its plan."""

    event: Literal["plan"] = "plan"
    steps: int
    """Number of steps of the plan."""
    pending: tuple[str, ...]
    """Names of the steps to run, e.g. convert/stage0/group0. The part before the first '/' is the kind."""
    build_key: str
    already_published: bool
    warnings: tuple[Words, ...] = ()
    notes: tuple[Words, ...] = ()
    estimates: tuple[float, ...] = ()
    """Estimated seconds of each pending step; empty when the driver does not estimate."""
    release: str = ""
    """NAME/VERSION to publish."""

    @staticmethod
    def of(plan: Plan, pending: Sequence[Step], *, already_published: bool = False) -> Planned:
        return Planned(
            steps=len(plan.steps),
            pending=tuple(step.name for step in pending),
            build_key=plan.build_key,
            already_published=already_published,
            warnings=plan.warnings,
            notes=plan.notes,
            estimates=tuple(round(step.estimate.seconds, 3) for step in pending),
            release=f"{plan.spec.release.name}/{plan.spec.release.version}",
        )


class NodesProbed(_Event):
    """Facts of the nodes, before the first step; missing where the cluster is this machine alone."""

    event: Literal["nodes"] = "nodes"
    nodes: tuple[NodeFacts, ...]
    warnings: tuple[Words, ...] = ()


class _OfStep(_Event):
    digest: str
    """Digest of the step."""
    step: str = Field(default_factory=lambda fields: fields.get("digest", ""))
    """Name of the step; its digest until the driver has named it."""
    attempt: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kind(self) -> str:
        """Kind of the step, e.g. convert."""
        return kind_of(self.step)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rank(self) -> int | None:
        """Rank that a build step compiles."""
        return _number("rank", self.step)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def stage(self) -> int | None:
        """Pipeline stage, or part of a calibration."""
        return stage_of(self.step)


class _OfAttempt(_OfStep):
    node: str = ""
    """Node of the attempt."""


class StepStarted(_OfAttempt):
    """An attempt began on a node."""

    event: Literal["started"] = "started"
    at: str = ""
    """Start on the node's clock: ISO 8601, UTC."""


class StepProgressed(_OfAttempt):
    """Progress of a phase of a step."""

    event: Literal["progress"] = "progress"
    phase: str
    """Name of the phase, e.g. convert, parse, tactics."""
    done: int
    total: int
    unit: Literal["bytes", "steps"]


class StepSucceeded(_OfAttempt):
    """Final: the outcome is committed."""

    event: Literal["succeeded"] = "succeeded"
    outcome: Outcome


class StepFailed(_OfAttempt):
    """Final: the attempt failed."""

    event: Literal["failed"] = "failed"
    failure: Failure


class StepRetried(_OfStep):
    """A step will be tried again."""

    event: Literal["retry"] = "retry"
    delay_seconds: float


class StepsFinished(_Event):
    """No step is left to run."""

    event: Literal["finish"] = "finish"
    ran: tuple[str, ...]
    """Names of the steps that ran in this build."""
    steps: tuple[tuple[Step, Outcome | None], ...] = Field(default=(), exclude=True, repr=False)
    """Every step of the plan with its outcome, for listeners in the driver's process: not in JSON."""


class Heartbeat(_Event):
    """The driver runs and has nothing else to report."""

    event: Literal["alive"] = "alive"


class Published(_Event):
    """Last event of a build that succeeded."""

    event: Literal["published"] = "published"
    manifest: str
    """URL of the release's manifest.json."""
    steps_run: int | None = None
    """Steps that this driver ran; others were committed before. None: unknown, because its log is lost."""
    verification: dict[str, Any] | None = None
    """Verification numbers of the manifest; None: the spec switched it off."""


class Errored(_Event):
    """Last event of a build that failed or was stopped."""

    event: Literal["error"] = "error"
    error: str
    """Class name of the error."""
    message: Words
    advice: Words = ""
    exit_code: int

    @staticmethod
    def of(error: OrchestratorError) -> Errored:
        return Errored(error=type(error).__name__, message=error.message, advice=error.advice, exit_code=error.exit_code)

    def to_error(self) -> OrchestratorError:
        """Return the error as the driver raised it; for an unknown class, an error with its exit code."""
        cls = error_classes().get(self.error)
        if cls is not None:
            return cls(self.message, self.advice)
        made = StepFailedError(f"{self.error}: {self.message}", self.advice)
        made.exit_code = self.exit_code  # type: ignore[misc]  # this one instance speaks for a newer driver's class
        return made


StepEvent = StepStarted | StepProgressed | StepSucceeded | StepFailed
"""Events of an attempt, which a cluster reports: its start, progress, and one final event."""
Event = Planned | NodesProbed | StepEvent | StepRetried | StepsFinished | Heartbeat | Published | Errored
STEP_EVENT: TypeAdapter[StepEvent] = TypeAdapter(Annotated[StepEvent, Field(discriminator="event")])
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
Listener = Callable[[Event], None]
"""Called with every event of a build, in order."""


def silent(event: Event) -> None:
    """Ignore an event; the listener that does nothing."""


def to_all(*listeners: Listener) -> Listener:
    """Return a listener that passes every event to each of `listeners`."""

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return listen


def print_line(event: Event) -> None:
    """Print an event to stdout as a line of JSON."""
    print(encode_line(event), flush=True)


def encode_line(event: Event) -> str:
    """Return an event as a line of JSON, without a newline; `decode_line` reads it."""
    return json.dumps(event.model_dump(mode="json"))


def decode_line(line: str) -> Event | None:
    """Return the event in a line; None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        return _EVENT.validate_json(line)
    except ValueError:
        return None


def kind_of(step: str) -> str:
    """Return the kind of a step, from its name."""
    return step.partition("/")[0]


def stage_of(step: str) -> int | None:
    """Return the pipeline stage or part of a step, from its name, e.g. convert/stage0/group1; None without one."""
    return _number("stage|part", step)


def _number(word: str, step: str) -> int | None:
    found = re.search(rf"/(?:{word})(\d+)", step)
    return int(found.group(1)) if found else None
