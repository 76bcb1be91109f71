"""Decode a RayJob's status into the state of its build. Pure: all decisions of `orchestrator k8s` about what it sees.

The words are those of KubeRay's RayJobStatus (apis/ray/v1/rayjob_types.go, v1.7).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.base.errors import (
    DeadlineError,
    DriverLostError,
    ManifestError,
    NotStartedError,
    OrchestratorError,
    TerminatedError,
    error_classes,
)
from orchestrator.events import Errored, Published
from orchestrator.events.log import LogReader
from orchestrator.submit.kubernetes.manifests import Fields, at
from orchestrator.submit.kubernetes.render import RELEASE
from orchestrator.submit.protocol import Notice

_LOST = "the driver was lost before it could report why"


class Phase(StrEnum):
    """Phase of a build on Kubernetes."""

    UNSEEN = "unseen"
    """The operator has not reported anything yet."""
    WAITING = "waiting"
    """Its Ray cluster is not up, or the driver waits for a place."""
    RUNNING = "running"
    RETRYING = "retrying"
    """An attempt failed; the operator creates another Ray cluster."""
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_over(self) -> bool:
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.STOPPED)


@dataclass(frozen=True)
class State:
    """State of a RayJob."""

    name: str
    phase: Phase
    reason: str = ""
    """Reason of the failure, as reported by the operator."""
    message: str = ""
    """Message of the operator or Ray; for a failed driver, with the last lines of its log."""
    job_id: str = ""
    """Ray's id of the driver."""
    ray_cluster: str = ""
    attempt: int = 1
    created: str = ""
    started: str = ""
    ended: str = ""
    deleting: bool = False
    release: str = ""
    """Address of the release, now or later; empty for a RayJob that was not made here."""

    def notice(self) -> Notice:
        """Return the state for people and machines."""
        attempt = f", attempt {self.attempt}" if self.attempt > 1 and not self.phase.is_over else ""
        where = f" ({self.ray_cluster})" if self.ray_cluster and not self.phase.is_over else ""
        fields = {"state": self.phase.value, "attempt": self.attempt, "reason": self.reason, "ray_cluster": self.ray_cluster}
        return Notice("state", f"{self.name}: {self.phase.value}{attempt}{where}", {"name": self.name, **fields})


_DEPLOYMENT = {
    "": Phase.UNSEEN,
    "Initializing": Phase.WAITING,
    "Waiting": Phase.WAITING,
    "Running": Phase.RUNNING,
    "Retrying": Phase.RETRYING,
    "Suspending": Phase.SUSPENDED,
    "Suspended": Phase.SUSPENDED,
    "Complete": Phase.SUCCEEDED,
    "Failed": Phase.FAILED,
    "ValidationFailed": Phase.FAILED,
}


def state_of(job: Fields) -> State:
    """Read a RayJob; unknown words of a newer operator count as running."""
    status = job.get("status") or {}
    phase = _DEPLOYMENT.get(status.get("jobDeploymentStatus", ""), Phase.RUNNING)
    ray = status.get("jobStatus", "")
    if phase is Phase.RUNNING and ray in ("", "PENDING"):
        phase = Phase.WAITING
    elif phase is Phase.SUCCEEDED and ray in ("FAILED", "STOPPED"):
        phase = Phase.FAILED if ray == "FAILED" else Phase.STOPPED
    return State(
        name=str(at(job, "metadata.name", "")),
        phase=phase,
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        job_id=status.get("jobId", ""),
        ray_cluster=status.get("rayClusterName", ""),
        attempt=int(status.get("failed", 0)) + (phase is not Phase.FAILED),
        created=str(at(job, "metadata.creationTimestamp", "")),
        started=status.get("startTime", ""),
        ended=status.get("endTime", ""),
        deleting=at(job, "metadata.deletionTimestamp") is not None,
        release=str((at(job, "metadata.annotations") or {}).get(RELEASE, "")),
    )


def failure(state: State, last_word: Published | Errored | None = None) -> OrchestratorError | None:
    """Return the error of an ended build; None when it succeeded.

    The driver's own error, if it was seen or is in the status; else the operator's; else the meaning of the driver's exit code.
    """
    if state.phase is Phase.SUCCEEDED:
        return None
    own = last_word if isinstance(last_word, Errored) else _last_word(state.message)
    if state.reason in _BY_REASON:
        return _by_reason(state)
    if own is not None:
        return own.to_error()
    if state.phase is Phase.STOPPED:
        return TerminatedError(f"{state.name} was stopped")
    return _by_exit_code(state)


def unchanging(state: State, seconds: float, patience_seconds: float) -> OrchestratorError | None:
    """Return the error of a RayJob that no operator touches, `seconds` after its creation; None within the time limit."""
    if state.phase is not Phase.UNSEEN or seconds < patience_seconds:
        return None
    return NotStartedError(
        f"RayJob {state.name} was made {seconds:.0f} s ago and no operator has touched it",
        "Check that the KubeRay operator runs and watches this namespace, and that no queue (Kueue) holds the job back.",
    )


def _by_reason(state: State) -> OrchestratorError:
    cls, what, advice = _BY_REASON[state.reason]
    return cls(f"{state.name} {what}: {_first_line(state.message) or state.reason}", advice)


_BY_REASON: dict[str, tuple[type[OrchestratorError], str, str]] = {
    "PreRunningDeadlineExceeded": (
        NotStartedError, "did not start before its preRunningDeadlineSeconds",
        "Look at the pods' events (`orchestrator k8s status` shows them): quota, GPUs, image. Then submit again.",
    ),
    "DeadlineExceeded": (
        DeadlineError, "ran longer than its activeDeadlineSeconds",
        "Raise activeDeadlineSeconds in an overlay of your own, or submit again: committed steps are not repeated.",
    ),
    "ValidationFailed": (
        ManifestError, "was refused by the operator",
        "Correct in the overlay what the operator names, and submit again.",
    ),
    "SubmissionFailed": (
        DriverLostError, "could not be given to its Ray cluster", "Look at the operator's log, then submit again.",
    ),
}  # fmt: skip


def _by_exit_code(state: State) -> OrchestratorError:
    found = re.search(r"exit code (-?[0-9]+)", state.message)
    code = int(found.group(1)) if found else None
    reader = LogReader()
    reader.feed(re.sub(r"^Job entrypoint command failed with [^\n]*", "", state.message) + "\n")  # Ray's text before the log
    tail = f"\n{reader.tail}" if reader.tail else ""
    cls = next((cls for cls in error_classes().values() if cls.exit_code == code and code != 1), DriverLostError)
    if cls is DriverLostError:
        return DriverLostError(f"{state.name}: {_LOST}" + (f", exit code {code}" if code is not None else "") + tail)
    return cls(f"{state.name}: the driver ended with exit code {code}{tail}")


def _last_word(message: str) -> Errored | None:
    reader = LogReader()
    reader.feed(message + "\n")
    return reader.last_word if isinstance(reader.last_word, Errored) else None


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]


def troubles(pods: list[Fields]) -> list[str]:
    """Return why pods do not run, one line each: not scheduled, image not found, killed for memory."""
    found: list[str] = []
    for pod in pods:
        name = str(at(pod, "metadata.name", "?"))
        found.extend(
            f"{name}: {condition.get('reason', 'Unschedulable')}: {condition.get('message', '')}"
            for condition in at(pod, "status.conditions", []) or []
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False"
        )
        for status in at(pod, "status.containerStatuses", []) or []:
            found.extend(f"{name}: {line}" for line in _container_troubles(status))
    return found


_HARMLESS = {"ContainerCreating", "PodInitializing", "Completed"}


def _container_troubles(status: Fields) -> list[str]:
    waiting, last = at(status, "state.waiting") or {}, at(status, "lastState.terminated") or {}
    ended = at(status, "state.terminated") or last
    lines = []
    if waiting.get("reason", "ContainerCreating") not in _HARMLESS:
        lines.append(f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": "))
    if ended.get("reason", "Completed") not in _HARMLESS:
        lines.append(f"container {status.get('name')} ended: {ended['reason']}, exit code {ended.get('exitCode')}")
    return lines
