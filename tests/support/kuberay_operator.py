"""A small controller that plays KubeRay's operator on RayJobs: the status transitions of its RayJob controller, deadlines, retries,
its finalizer; and the garbage collector of Kubernetes' controller manager, for what a RayJob owns. No pod runs.

What the driver of a build would do is a script by the RayJob's name (see Driver).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from orchestrator.submit.kubernetes.manifests import Fields, at

FINALIZER = "ray.io/rayjob-finalizer"
SUCCESS = "Job finished successfully."


class Admin(Protocol):
    """What a controller may do and a user of the program may not."""

    def jobs(self) -> list[Fields]: ...

    def owned(self) -> list[Fields]:
        """Objects of any namespace that have an owner."""
        ...

    def set_status(self, job: Fields, status: Fields) -> None: ...

    def set_finalizers(self, job: Fields, finalizers: list[str]) -> None: ...

    def remove(self, obj: Fields) -> None: ...


@dataclass
class Driver:
    """What the driver comes to."""

    ends: Literal["succeeds", "fails", "runs", "never starts"] = "succeeds"
    message: str = ""
    """What Ray says of a failed one."""
    fails_first: int = 0
    """Attempts that fail before one that ends as it says."""


def ray_failure(code: int, *lines: str) -> str:
    """The message of a Ray job whose entry point failed, as Ray 2.60 words it."""
    return f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n" + "\n".join(
        lines
    )


def error_line(error: str, code: int, message: str = "what is wrong") -> str:
    """The last line of `orchestrator build --json`."""
    return json.dumps({"event": "error", "error": error, "message": message, "advice": "what to do", "exit_code": code})


@dataclass
class Operator:
    """Each step() takes every RayJob one transition on."""

    admin: Admin
    now: Callable[[], float] = time.time
    drivers: dict[str, Driver] = field(default_factory=dict)
    """By RayJob; others succeed."""
    asleep: bool = False
    began: dict[str, float] = field(default_factory=dict)
    """When it first saw a RayJob, by uid."""

    def step(self) -> None:
        if self.asleep:
            return
        jobs = self.admin.jobs()
        for job in jobs:
            self._reconcile(job)
        alive = {str(at(job, "metadata.uid")) for job in jobs}
        for obj in self.admin.owned():
            if all(owner["uid"] not in alive for owner in obj["metadata"]["ownerReferences"]):
                self.admin.remove(obj)

    def _reconcile(self, job: Fields) -> None:
        status = dict(job.get("status") or {})
        if at(job, "metadata.deletionTimestamp"):
            if at(job, "metadata.finalizers"):
                self.admin.set_finalizers(job, [])
            return
        if FINALIZER not in (at(job, "metadata.finalizers") or []):
            self.admin.set_finalizers(job, [FINALIZER])
            return
        uid = str(at(job, "metadata.uid"))
        waited = self.now() - self.began.setdefault(uid, self.now())
        changed = self._deadline(job, status, waited) or self._next(job, status)
        if changed and changed != status:
            self.admin.set_status(job, changed)

    def _deadline(self, job: Fields, status: Fields, waited: float) -> Fields | None:
        deployment = status.get("jobDeploymentStatus", "")
        limits = {
            "Initializing": ("preRunningDeadlineSeconds", "PreRunningDeadlineExceeded"),
            "Running": ("activeDeadlineSeconds", "DeadlineExceeded"),
        }
        if deployment not in limits:
            return None
        limit, reason = limits[deployment]
        seconds = at(job, f"spec.{limit}")
        if seconds is None or waited < seconds:
            return None
        return {**status, "jobDeploymentStatus": "Failed", "reason": reason, "message": f"The RayJob has passed the {limit}"}

    def _next(self, job: Fields, status: Fields) -> Fields | None:
        name = str(at(job, "metadata.name"))
        driver = self.drivers.get(name, Driver())
        failed = int(status.get("failed", 0))
        deployment, ray = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
        if deployment in ("", "Retrying"):
            return {
                **status, "jobDeploymentStatus": "Initializing", "jobStatus": "", "message": "", "reason": "",
                "jobId": f"{name}-{failed}", "rayClusterName": f"{name}-{failed}", "startTime": "2026-01-01T00:00:00Z",
            }  # fmt: skip
        if deployment == "Initializing":
            return None if driver.ends == "never starts" else {**status, "jobDeploymentStatus": "Running", "jobStatus": "PENDING"}
        if deployment != "Running":
            return None
        if ray == "PENDING":
            return {**status, "jobStatus": "RUNNING"}
        if driver.ends == "fails" or failed < driver.fails_first:
            return self._failed(job, status, driver.message, failed)
        if driver.ends == "runs":
            return None
        return {
            **status,
            "jobDeploymentStatus": "Complete",
            "jobStatus": "SUCCEEDED",
            "message": SUCCESS,
            "succeeded": 1,
            "endTime": "2026-01-01T01:00:00Z",
        }

    @staticmethod
    def _failed(job: Fields, status: Fields, message: str, failed: int) -> Fields:
        ended = {**status, "jobStatus": "FAILED", "reason": "AppFailed", "message": message, "failed": failed + 1}
        again = failed < int(at(job, "spec.backoffLimit") or 0)
        return {**ended, "jobDeploymentStatus": "Retrying" if again else "Failed"}


class OperatorThread:
    """An operator at work beside the test. A context manager."""

    def __init__(self, operator: Operator, seconds: float = 0.05) -> None:
        self.operator, self._seconds = operator, seconds
        self.errors: list[BaseException] = []
        """Of steps; a server that is away counts as none."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            try:
                self.operator.step()
            except Exception as error:
                self.errors.append(error)

    def __enter__(self) -> Operator:
        self._thread.start()
        return self.operator

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()
