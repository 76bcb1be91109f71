"""Builds submitted to a Ray cluster: submit, follow, stop, find again.

    from actors import Client

    submission = Client("http://head:8265").submit(spec, place)
    for event in submission.events(): ...
    print(submission.result().manifest)

A build has one id. A second submission attaches to the job that runs or has succeeded. After a failed or stopped job it gets a new
one, `<id>-2` and so on: Ray accepts each id once, even of deleted jobs, and a failed job's log is worth keeping. Nothing secret
travels: the driver finds its credentials on its node.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.job_api import DuplicateJobError, Job, JobApi, is_here, unmet
from orchestrator.base.errors import (
    ClusterError,
    DriverLostError,
    NotStartedError,
    OrchestratorError,
    SpecError,
    UnknownSubmissionError,
    UnreachableError,
)
from orchestrator.events import Event, Published
from orchestrator.events.log import LogReader, conclude
from orchestrator.releases.manifest import MANIFEST, release_prefix
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, DriverSpec
from orchestrator.submit.bundle import ENTRYPOINT, bundle, expected_on_nodes, pack, submission_id
from orchestrator.submit.protocol import Clock, Existing, Patience, decide

START_SECONDS = 900.0
"""Longest time that a job may be pending; an autoscaler needs minutes."""
_PATIENCE_SECONDS = 600.0
"""Longest time without an answer of the cluster before following ends; the build itself continues."""
_POLL_SECONDS = 1.0
_POLL_SHARE = 10
"""Ratio of the pause between polls to the duration of a poll: each poll transfers the whole log."""
_LOG_TRIES = 5
_MARK, _DRIVER = "trt-orchestrator", "driver"


@dataclass(frozen=True, slots=True)
class Choice:
    """Decision of a submission about the existing jobs."""

    job_id: str
    attach: bool
    """True: attach to the job. False: submit it."""
    withdraw: str = ""
    """Id of a pending job to withdraw, because it waits for another place than requested now; empty: no job."""


def choose(build: str, driver: DriverSpec, jobs: Sequence[Job]) -> Choice:
    """Choose by `decide` and the build's last job. A job that is not attached to is followed by the next number."""
    pattern = re.compile(rf"{re.escape(build)}(?:-([0-9]+))?")
    known = {int(match[1] or 1): job for job in jobs if (match := pattern.fullmatch(job.id))}
    if not known:
        return Choice(build, attach=False)
    number = max(known)
    last = known[number]
    misplaced = last.state == "PENDING" and last.metadata.get(_DRIVER, "") != _place_of(driver)
    if decide(Existing(failed=last.state in ("FAILED", "STOPPED"), other_place=misplaced)) == "attach":
        return Choice(last.id, attach=True)
    return Choice(f"{build}-{number + 1}", attach=False, withdraw=last.id if misplaced else "")


def _place_of(driver: DriverSpec) -> str:
    return json.dumps(driver.model_dump(mode="json", exclude={"stop_seconds"}), sort_keys=True)


class Client:
    """A cluster to submit builds to."""

    def __init__(self, address: str | None = None, *, api: JobApi | None = None, clock: Clock | None = None) -> None:
        """Connect to the head's dashboard; see JobApi for `address` and errors. `api` and `clock`: for tests."""
        self._api = api or JobApi(address)
        self.address = self._api.address
        self._clock = clock or Clock()

    def submit(
        self, spec: BuildSpec, cluster_spec: ClusterSpec, *, driver: DriverSpec | None = None, start_seconds: float = START_SECONDS
    ) -> RaySubmission:
        """Submit a build, or attach to its existing job.

        `driver` replaces that of the cluster file. Raises SpecError for a cluster file of another kind than ray,
        SourceMissingError for a named file that is missing here, UnreachableError, AuthenticationError, ClusterError.
        """
        if cluster_spec.kind != "ray":
            raise SpecError(f"the cluster file is of kind {cluster_spec.kind}, but this is a Ray cluster", "Set kind: ray in it.")
        where = driver or cluster_spec.driver
        packed = pack(spec)
        build = submission_id(packed.spec, cluster_spec)
        for _ in range(3):  # others may submit the same build at the same time
            choice = choose(build, where, self._api.jobs())
            if choice.withdraw:
                self._api.stop(choice.withdraw)
            try:
                if not choice.attach:
                    self._send(choice.job_id, packed.spec, packed.files, cluster_spec, where)
            except DuplicateJobError:
                continue
            return RaySubmission(
                self._api, choice.job_id, self._clock, start_seconds, where,
                attached=choice.attach, warnings=self._warnings(packed.spec, cluster_spec),
            )  # fmt: skip
        raise ClusterError(f"other processes keep submitting {build}", "Look at `orchestrator list`.")

    def attach(self, job_id: str, *, start_seconds: float = START_SECONDS) -> RaySubmission:
        """Return a submission by its id, from any machine. Raises UnknownSubmissionError."""
        job = self._api.job(job_id)
        driver = DriverSpec.model_validate_json(job.metadata.get(_DRIVER, "{}"))
        return RaySubmission(self._api, job_id, self._clock, start_seconds, driver, attached=True)

    def list(self) -> list[Job]:
        """Return the builds submitted to this cluster, oldest first."""
        found = [job for job in self._api.jobs() if _MARK in job.metadata]
        return sorted(found, key=lambda job: job.submitted_at or 0.0)

    def _send(self, job_id: str, spec: BuildSpec, files: dict[str, Path], cluster_spec: ClusterSpec, driver: DriverSpec) -> None:
        inside = cluster_spec.model_copy(update={"address": "auto"})  # the driver runs inside its cluster
        release = release_prefix(spec.release.name, spec.release.version)
        metadata = {
            _MARK: importlib.metadata.version(_MARK),
            "release": f"{spec.release.name} {spec.release.version}",
            "manifest": f"{cluster_spec.store.rstrip('/')}/{release.rstrip('/')}/{MANIFEST}",
            _DRIVER: _place_of(driver),
        }
        env = {"RAY_JOB_STOP_WAIT_TIME_S": str(driver.stop_seconds)}
        with tempfile.TemporaryDirectory(prefix="submit-") as temporary:
            folder = Path(temporary)
            for name, text in bundle(spec, inside).items():
                (folder / name).write_text(text)
            for name, path in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
            self._api.submit(job_id, ENTRYPOINT, folder, driver, metadata, env)

    def _warnings(self, spec: BuildSpec, cluster_spec: ClusterSpec) -> tuple[str, ...]:
        return () if is_here(self.address) else expected_on_nodes(spec, cluster_spec)


class RaySubmission:
    """A submitted build, which runs whether or not anyone follows it: Followed of submit.protocol."""

    def __init__(
        self, api: JobApi, job_id: str, clock: Clock, start_seconds: float, driver: DriverSpec,
        *, attached: bool, warnings: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.id, self.warnings = job_id, warnings
        self.attached = attached
        """Whether the build existed before it was submitted."""
        self._api, self._clock, self._start_seconds, self._driver = api, clock, start_seconds, driver
        self._log = LogReader()
        self._followed = False

    def status(self) -> Job:
        """Return the job as Ray reports it now."""
        return self._api.job(self.id)

    def logs(self) -> str:
        """Return everything that the driver has printed so far."""
        return self._api.log(self.id)

    def events(self, timeout_seconds: float | None = None) -> Iterator[Event]:
        """See Followed. Failed polls are repeated for minutes.

        Raises NotStartedError when the job is pending for too long, UnreachableError when the cluster does not answer for minutes,
        DriverLostError when the cluster no longer has the job, TimeoutError after `timeout_seconds`.
        """
        self._log = LogReader()
        for piece in self._pieces(timeout_seconds):
            yield from self._log.feed(piece)
        yield from self._log.close()

    def lines(self) -> Iterator[str]:
        """Yield all lines of the log as they arrive. Raises as `events`."""
        self._log = LogReader()
        begun = ""
        for piece in self._pieces(None):
            self._log.feed(piece)
            *whole, begun = (begun + piece).split("\n")
            yield from whole
        self._log.close()
        if begun:
            yield begun

    def _pieces(self, timeout_seconds: float | None) -> Iterator[str]:
        """Yield the log's growth from poll to poll, until the job has ended."""
        began, read, patience = self._clock.now(), 0, Patience(self._clock, _PATIENCE_SECONDS)
        while True:
            asked = self._clock.now()
            try:
                job = self._look()
                patience.answered()
                self._check_started(job, began)
                text = self._log_of(job)
            except UnreachableError as error:
                patience.failed(error)
            else:
                if len(text) > read:
                    yield text[read:]
                    read = len(text)
                if job.ended:
                    self._followed = True
                    return
            if timeout_seconds is not None and self._clock.now() - began >= timeout_seconds:
                raise TimeoutError(f"{self.id} has not ended in {timeout_seconds:g} s")
            self._clock.sleep(max(_POLL_SECONDS, _POLL_SHARE * (self._clock.now() - asked)))

    def result(self, timeout_seconds: float | None = None) -> Published:
        """See Followed. Raises as `events` too."""
        if not self._followed:
            for _ in self.events(timeout_seconds):
                pass
        job, said = self.status(), self._log.last_word
        if said is None and job.state == "SUCCEEDED":
            return Published(manifest=job.metadata.get("manifest", ""))  # the log is lost with its node, but the release is not
        if said is None and job.never_started:
            raise NotStartedError(f"{self.id} could not start: {_first_line(job.message)}")
        reason = self._log.tail or _first_line(job.message)
        if job.end_signal:
            reason = f"it was ended by {job.end_signal}; {reason}"
        elif job.exit_code is not None:
            reason = f"exit code {job.exit_code}; {reason}"
        return conclude(said, stopped=job.state == "STOPPED", where=self.id, reason=reason)

    def cancel(self, wait_seconds: float | None = None) -> Job:
        """Request a clean end of the driver and wait for it. Committed steps stay. Returns the job as Ray reports it then.

        A job that is still pending afterwards is withdrawn: it ends as soon as it starts.
        """
        self._api.stop(self.id)
        end = self._clock.now() + (self._driver.stop_seconds + 15.0 if wait_seconds is None else wait_seconds)
        while not (job := self.status()).ended and self._clock.now() < end:
            self._clock.sleep(_POLL_SECONDS)
        return job

    def _look(self) -> Job:
        try:
            return self.status()
        except UnknownSubmissionError:
            raise DriverLostError(f"{self._api.address} has forgotten {self.id}: its head was replaced") from None

    def _log_of(self, job: Job) -> str:
        """Return the log; for an ended job whose log cannot be read for some seconds, the end that Ray kept."""
        for _ in range(_LOG_TRIES if job.ended else 0):
            try:
                return self.logs()
            except UnreachableError:
                self._clock.sleep(_POLL_SECONDS)
        return job.message if job.ended else self.logs()

    def _check_started(self, job: Job, began: float) -> None:
        if job.state != "PENDING" or self._clock.now() - began < self._start_seconds:
            return
        try:
            reason = unmet(self._driver, self._api.nodes())
        except OrchestratorError:
            reason = job.message
        raise NotStartedError(
            f"{self.id} has not started in {self._start_seconds:g} s: {reason}",
            "It still waits, and starts when it can. `orchestrator stop` withdraws it. To place it elsewhere, submit again with "
            "another `driver:` in the cluster file.",
        )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason is known"
