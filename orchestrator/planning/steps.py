"""Steps, their outcomes and failures. All are plain JSON values, so any process can run a step."""

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
    """Resources that a step occupies while it runs."""

    cpus: int = 1
    gpus: int = 0
    memory_bytes: int = 0
    scratch_bytes: int = 0
    """Size of the files that are copied to the node's scratch folder, if the store is not a folder of the node."""


class Estimate(_Value):
    """Estimated bytes and time of a step, from headers."""

    read_bytes: int = 0
    write_bytes: int = 0
    work_bytes: int = 0
    """Bytes that the step's time is proportional to; see spec/rates.py."""
    seconds: float = 0.0
    """Time on one ordinary core, for the schedule and the simulation. Correctness does not depend on it."""


class Step(_Value):
    """A unit of work. Its digest covers kind, version, options and needs, but not locations, resources or estimates."""

    kind: Kind
    version: int
    """Version of the step's code, raised when the same options would give other outputs."""
    name: str
    """Name for people, e.g. convert/stage0/group0."""
    options: dict[str, Any]
    """Options that determine the outputs: the JSON of one class of planning/options.py."""
    needs: tuple[str, ...] = ()
    """Digests of the steps whose outputs this step reads."""
    locations: dict[str, str] = Field(default_factory=dict)
    """Paths or URLs of inputs. No part of the digest."""
    resources: Resources = Resources()
    estimate: Estimate = Estimate()

    @property
    def rank(self) -> int | None:
        """Rank that a build step compiles; None: a step of a stage or of the whole model."""
        number = self.name.removeprefix("build/rank")
        return int(number) if number.isdigit() else None

    @cached_property
    def digest(self) -> str:
        return digest_of({"kind": self.kind.value, "version": self.version, "options": self.options, "needs": list(self.needs)})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy as pydantic does, without the cached digest."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("digest", None)
        return copy


class Output(_Value):
    """One object that a step wrote."""

    name: str
    """Name within the step, e.g. rank0.safetensors."""
    key: str
    """Key in the store."""
    num_bytes: int
    sha256: str
    chunks: tuple[str, ...] = ()
    """sha256 of every CHUNK_BYTES; empty: the object is not published."""


class Consumed(_Value):
    """An output of another step, as an attempt read it."""

    step: str
    """Digest of the step that wrote it."""
    name: str
    sha256: str
    """sha256 of the bytes that were read."""


class Usage(_Value):
    """Resource usage of an attempt, sampled about once a second. Peaks between two samples are missed."""

    peak_memory_bytes: int = 0
    """Peak resident memory of the worker and its child processes."""
    cpu_seconds: float = 0.0
    """CPU time of the worker and its child processes, which count when they end."""
    host_cpu: float | None = None
    """Mean load of all cores of the node during the attempt, by all processes, 0 to 1."""
    gpu_utilization: float | None = None
    """Mean GPU utilization over samples and the step's devices, from NVML, 0 to 1. None: no device, or no NVML."""
    peak_gpu_memory_bytes: int | None = None
    """Peak memory in use on one of the step's devices, by all processes."""
    num_samples: int = 0


class Outcome(_Value):
    """Outcome of a step that succeeded. Committed under the step's digest."""

    digest: str
    name: str
    kind: Kind
    outputs: tuple[Output, ...]
    consumed: tuple[Consumed, ...] = ()
    """Outputs of other steps that it was made from."""
    facts: Facts = Facts()
    """Facts that the step recorded: one class of planning/facts.py per kind."""
    node: str = ""
    started_at: str = ""
    """Start of the attempt, ISO 8601, UTC."""
    seconds: float = 0.0
    tools: dict[str, str] = Field(default_factory=dict)
    usage: Usage | None = None
    log: str = ""
    """Key of the whole log; empty: the step logged nothing."""
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
        """Return the facts as the class `facts`. Raises TypeError for an outcome of another kind, or without facts."""
        if not isinstance(self.facts, facts):
            raise TypeError(f"{self.name} recorded {type(self.facts).__name__}, not {facts.__name__}")
        return self.facts

    def output(self, name: str) -> Output:
        """Return the output `name`. Raises KeyError when there is none."""
        for output in self.outputs:
            if output.name == name:
                return output
        raise KeyError(f"{self.name} has no output {name!r}")


class FailureKind(StrEnum):
    """Kind of a failure, which decides whether the step is retried."""

    INFRASTRUCTURE = "infrastructure"
    """Loss of a node, worker or store. The same step may succeed elsewhere."""
    APPLICATION = "application"
    """Error of the step itself, which would happen again."""
    CANCELLED = "cancelled"
    HANDED_OVER = "handed_over"
    """The node is being taken back. The step moves to another node, and the attempt does not count as failed."""


class Cause(StrEnum):
    """Cause of a failure of the infrastructure."""

    UNKNOWN = ""
    NODE = "node"
    """The node died or was cut off."""
    WORKER = "worker"
    """The process that ran the step died."""
    MEMORY = "memory"
    DISK = "disk"
    STORE = "store"
    """The store could not be reached."""
    DRAIN = "drain"
    """The node is being taken back."""
    PLACE = "place"
    """No node could take the step."""


_AGAIN = "; then run the same command again: committed steps are not repeated."
_ADVICE = {
    Cause.NODE: "See why the node was lost" + _AGAIN,
    Cause.WORKER: "Read the end of the worker's log in the build's record; if the worker was killed, find out by whom" + _AGAIN,
    Cause.MEMORY: "Give the step's pool more memory in the cluster file, or make ranks smaller with more tp or pp" + _AGAIN,
    Cause.DISK: "Free space in the node's scratch folder, or set `scratch` in the cluster file to a larger one" + _AGAIN,
    Cause.STORE: "See that the node reaches the store" + _AGAIN,
    Cause.PLACE: "Compare the pools of the cluster file with what the nodes have, and mend one of them" + _AGAIN,
}
"""Advice by cause, for errors without advice of their own."""


class Failure(_Value):
    """Failure of an attempt."""

    kind: FailureKind
    message: str
    error: str = ""
    """Class name of the OrchestratorError; empty: another error."""
    advice: str = ""
    cause: Cause = Cause.UNKNOWN
    damaged: str = ""
    """Key of the stored output that was damaged or missing when the attempt read it; empty: none was."""
    node: str = ""
    rank: int | None = None
    """Rank of a build step."""
    attempt: int = 0
    log_tail: str = ""
    """End of the step's log."""
    traceback: str = ""
    worker_log: str = ""
    """End of the worker process's stderr."""
    kernel: str = ""
    """Kernel message about a process that it killed for memory."""

    @staticmethod
    def of(error: BaseException, node: str = "", log_tail: str = "") -> Failure:
        """Return the failure for an error that the step's code raised."""
        if isinstance(error, OrchestratorError):
            name, advice, message = type(error).__name__, error.advice, error.message
        else:
            name, advice, message = "", "", f"{type(error).__name__}: {error}"
        damaged = error.key if isinstance(error, DamagedOutputError) else ""
        return Failure(
            kind=FailureKind.APPLICATION, message=message, error=name, advice=advice, damaged=damaged, node=node, log_tail=log_tail
        )

    def to_error(self, step_name: str) -> OrchestratorError:
        """Return the error to raise for the user, with class and exit code of the original."""
        cls = error_classes().get(self.error, StoreFullError if self.cause is Cause.DISK else StepFailedError)
        return cls(f"{step_name}: {self.message}", self.advice or _ADVICE.get(self.cause, ""))


class Task(_Value):
    """A step as sent to a worker, with the outcomes of its needs and the store."""

    step: Step
    inputs: dict[str, Outcome]
    """Outcome of every need, by digest."""
    attempt: int
    order: int = 0
    """Priority among waiting tasks: the smallest first, equal ones in order of arrival."""
    store: str
    """URL of the store."""
    store_options: StoreOptions = StoreOptions()
    """Connection to the store. No part of any digest."""
    scratch: str | None = None
    build_id: str = ""
    """Prefix of the names of all attempts of one run of a build, which identifies leftovers of its killed attempts."""
    profile: tuple[str, ...] | None = None
    """Options of `nsys profile`, under which the step runs; None: not profiled."""
    log_format: Literal["text", "json"] = "text"
    """Format of the step's log."""
