"""One unit of work, what came of it, and how it failed. All of it survives JSON, so any place can run it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from orchestrator.base.digest import digest_of
from orchestrator.base.errors import DamagedOutputError, OrchestratorError, StepFailedError, StoreFullError, error_classes
from orchestrator.planning.facts import Facts, decode_facts
from orchestrator.planning.kinds import Kind as Kind
from orchestrator.spec.cluster import StoreOptions

F = TypeVar("F", bound=Facts)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Resources(_Value):
    """What a step occupies while it runs."""

    cpus: int = 1
    gpus: int = 0
    memory_bytes: int = 0
    scratch_bytes: int = 0
    """Copied to the node's scratch folder where the store is not a folder of the node."""


class Estimate(_Value):
    """What a step is expected to move and take, known from headers."""

    read_bytes: int = 0
    write_bytes: int = 0
    work_bytes: int = 0
    """What the step's time grows with; see spec/rates.py."""
    seconds: float = 0.0
    """On one ordinary core; orders the schedule and drives the simulation, nothing depends on it being right."""


class Step(_Value):
    """A unit of work. Its digest covers kind, version, options and needs; never locations, resources or estimates."""

    kind: Kind
    version: int
    """Of the code that runs it: raised when the same options would give other outputs."""
    name: str
    """For people, e.g. convert/stage0/group0."""
    options: dict[str, Any]
    """Everything that decides the outputs: the JSON of one class of planning/options.py."""
    needs: tuple[str, ...] = ()
    """Digests of the steps whose outputs this one reads."""
    locations: dict[str, str] = Field(default_factory=dict)
    """Where inputs are found; not identity."""
    resources: Resources = Resources()
    estimate: Estimate = Estimate()

    @property
    def rank(self) -> int | None:
        """The rank that a build step compiles; None for steps of a stage or of the whole model."""
        number = self.name.removeprefix("build/rank")
        return int(number) if number.isdigit() else None

    @cached_property
    def digest(self) -> str:
        return digest_of({"kind": self.kind.value, "version": self.version, "options": self.options, "needs": list(self.needs)})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but the copy does not inherit the cached digest."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("digest", None)
        return copy


class Output(_Value):
    """One object that a step wrote."""

    name: str
    """E.g. rank0.safetensors."""
    key: str
    """In the store."""
    num_bytes: int
    sha256: str
    chunks: tuple[str, ...] = ()
    """sha256 of every CHUNK_BYTES, for what is going to be published; else empty."""


class Consumed(_Value):
    """An output of another step, as an attempt read it."""

    step: str
    """Digest of the step that wrote it."""
    name: str
    sha256: str
    """sha256 of the bytes that were read."""


class Usage(_Value):
    """What an attempt took of its node, sampled once a second or so: peaks between two samples are missed."""

    peak_memory_bytes: int = 0
    """Resident, of the worker and the processes that it started."""
    cpu_seconds: float = 0.0
    """Of the same; children count when they have ended."""
    host_cpu: float | None = None
    """Mean over the attempt of the share of all cores that were busy, with whatever else ran there; 0 to 1."""
    gpu_utilization: float | None = None
    """Mean over samples and the step's devices, as NVML says it; 0 to 1. None: no device, or no NVML."""
    peak_gpu_memory_bytes: int | None = None
    """The most that was in use on one of the step's devices, by anyone."""
    num_samples: int = 0


class Outcome(_Value):
    """What happened: the outputs of a step and how it went. Committed under the step's digest."""

    digest: str
    name: str
    kind: Kind
    outputs: tuple[Output, ...]
    consumed: tuple[Consumed, ...] = ()
    """The outputs of its needs that it was made from."""
    facts: Facts = Facts()
    """What the kind records: one class of planning/facts.py per kind."""
    node: str = ""
    started_at: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0
    tools: dict[str, str] = Field(default_factory=dict)
    usage: Usage | None = None
    log: str = ""
    """Key of the whole log; empty when the step said nothing."""
    log_tail: str = ""

    @field_serializer("facts")
    def _facts_that_were_set(self, facts: Facts) -> dict[str, Any]:
        return facts.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="before")
    @classmethod
    def _facts_of_the_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("facts"), dict):
            return {**data, "facts": decode_facts(Kind(data["kind"]), data["facts"])}
        return data

    def facts_as(self, facts: type[F]) -> F:
        """The facts, which are of the class `facts`. Raises TypeError for an outcome of another kind, or without facts."""
        if not isinstance(self.facts, facts):
            raise TypeError(f"{self.name} recorded {type(self.facts).__name__}, not {facts.__name__}")
        return self.facts

    def output(self, name: str) -> Output:
        """The output called `name`. Raises KeyError."""
        for output in self.outputs:
            if output.name == name:
                return output
        raise KeyError(f"{self.name} has no output {name!r}")


class FailureKind(StrEnum):
    """Whose fault it was: decides whether to try again."""

    INFRASTRUCTURE = "infrastructure"
    """Node, worker or store lost: the same step may succeed elsewhere."""
    APPLICATION = "application"
    """The step's own error: it would happen again."""
    CANCELLED = "cancelled"
    HANDED_OVER = "handed_over"
    """Its node is being taken back: the step goes elsewhere, and this was no failed attempt."""


class Cause(StrEnum):
    """What the machinery lost or lacked."""

    UNKNOWN = ""
    NODE = "node"
    """Died, or was cut off."""
    WORKER = "worker"
    """The process that ran the step."""
    MEMORY = "memory"
    DISK = "disk"
    STORE = "store"
    """Could not be reached."""
    DRAIN = "drain"
    """The node is being taken back."""
    PLACE = "place"
    """No node could take the step."""


_AGAIN = "; then run the same command again: committed steps are not repeated."
_ADVICE = {
    Cause.NODE: "See why the node was lost" + _AGAIN,
    Cause.WORKER: "The end of the worker's log stands in the build's record; where it was killed, see by whom" + _AGAIN,
    Cause.MEMORY: "Give the step's pool more memory in the cluster file, or make ranks smaller with more tp or pp" + _AGAIN,
    Cause.DISK: "Free space in the node's scratch folder, or set `scratch` in the cluster file to a larger one" + _AGAIN,
    Cause.STORE: "See that the node reaches the store" + _AGAIN,
    Cause.PLACE: "Compare the pools of the cluster file with what the nodes have, and mend one of them" + _AGAIN,
}
"""Advice by the cause of a lost step, where its own error has none."""


class Failure(_Value):
    """Why an attempt failed."""

    kind: FailureKind
    message: str
    error: str = ""
    """Class name of the OrchestratorError that it was, if it was one."""
    advice: str = ""
    cause: Cause = Cause.UNKNOWN
    damaged: str = ""
    """Key of the stored output whose bytes were wrong or gone when the attempt read it; empty: none was."""
    node: str = ""
    rank: int | None = None
    """Of a build step."""
    attempt: int = 0
    log_tail: str = ""
    """The end of the step's own log."""
    traceback: str = ""
    worker_log: str = ""
    """The end of what the worker's process wrote to stderr."""
    kernel: str = ""
    """What the kernel said of a process that it killed for memory."""

    @staticmethod
    def of(error: BaseException, node: str = "", log_tail: str = "") -> Failure:
        """An error raised by a step's own code."""
        if isinstance(error, OrchestratorError):
            name, advice, message = type(error).__name__, error.advice, error.message
        else:
            name, advice, message = "", "", f"{type(error).__name__}: {error}"
        damaged = error.key if isinstance(error, DamagedOutputError) else ""
        return Failure(
            kind=FailureKind.APPLICATION, message=message, error=name, advice=advice, damaged=damaged, node=node, log_tail=log_tail
        )

    def to_error(self, step_name: str) -> OrchestratorError:
        """The error to raise for the user; keeps class and exit code of the original."""
        cls = error_classes().get(self.error, StoreFullError if self.cause is Cause.DISK else StepFailedError)
        return cls(f"{step_name}: {self.message}", self.advice or _ADVICE.get(self.cause, ""))


class Task(_Value):
    """A step on its way to a worker: with what its needs produced and where to write."""

    step: Step
    inputs: dict[str, Outcome]
    """Outcome of every need, by digest."""
    attempt: int
    order: int = 0
    """Among tasks that wait for room the smallest goes first; those with the same one in order of arrival."""
    store: str
    """URL."""
    store_options: StoreOptions = StoreOptions()
    """How to reach it; no part of any identity."""
    scratch: str | None = None
    build_id: str = ""
    """Begins the name of every attempt of one run of a build, so that what its killed attempts left can be told from others'."""
    profile: tuple[str, ...] | None = None
    """Run under `nsys profile` with these options; None: not."""
    log_format: Literal["text", "json"] = "text"
    """Of the step's log."""
