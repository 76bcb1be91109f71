"""Ray's job API, reduced to the calls that submissions need. Each request has a time limit, each failure is an error of ours.

The only place that knows Ray's SDK for jobs. It polls, because Ray's own log streaming ends healthy builds.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import ray
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.dashboard.utils import get_address_for_submission_client
from ray.job_submission import JobSubmissionClient

from orchestrator.base.errors import (
    AuthenticationError,
    ClusterError,
    DriverLostError,
    NotStartedError,
    OrchestratorError,
    TerminatedError,
    UnknownSubmissionError,
    UnreachableError,
    error_classes,
)
from orchestrator.run.labels import selects
from orchestrator.spec.cluster import DriverSpec

_REQUEST_SECONDS = 30.0
_NEVER_STARTED = {"RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"}
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_ADVICE = "Give the address of the head's dashboard, http://HOST:8265; on Kubernetes forward that port first."


class DuplicateJobError(Exception):
    """A job of this id exists: another process has just submitted it. The client attaches; no user ever sees this error."""


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job as Ray reports it."""

    id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str = ""
    """Message of Ray; for a failed job, with the end of its log."""
    error_type: str = ""
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    submitted_at: float | None = None
    """Submission time in Unix seconds, by the cluster's clock."""
    ended_at: float | None = None
    node: str = ""
    """Ray's id of the driver's node."""

    @property
    def ended(self) -> bool:
        return self.state not in ("PENDING", "RUNNING")

    @property
    def never_started(self) -> bool:
        """Whether Ray could not run the driver at all."""
        return self.error_type in _NEVER_STARTED

    @property
    def end_signal(self) -> str:
        """Name of the signal that ended the driver; empty: no signal did."""
        return signal.Signals(-self.exit_code).name if self.exit_code is not None and self.exit_code < 0 else ""

    @property
    def build_exit_code(self) -> int | None:
        """Exit code that following the build returns: a killed or crashed driver counts as lost. None while it runs."""
        if not self.ended:
            return None
        if self.state == "SUCCEEDED":
            return 0
        if self.never_started:
            return NotStartedError.exit_code
        own = {cls.exit_code for cls in error_classes().values()} - {OrchestratorError.exit_code}
        if self.exit_code in own:
            return self.exit_code
        return TerminatedError.exit_code if self.state == "STOPPED" else DriverLostError.exit_code


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """Total resources of a node, held or free."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


class JobApi(Protocol):
    """Calls of submissions to a cluster. Raises UnreachableError, AuthenticationError, UnknownSubmissionError."""

    @property
    def address(self) -> str: ...

    def submit(
        self, job_id: str, entrypoint: str, folder: Path, driver: DriverSpec, metadata: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        """Upload `folder` as the working directory and submit. Raises DuplicateJobError."""
        ...

    def jobs(self) -> list[Job]: ...

    def job(self, job_id: str) -> Job: ...

    def log(self, job_id: str) -> str:
        """Return everything that the job has printed so far."""
        ...

    def stop(self, job_id: str) -> bool:
        """Request the job's end; False when it has already ended. A pending job ends when it starts."""
        ...

    def nodes(self) -> list[NodeOffer]: ...


class RayJobApi:
    """See JobApi."""

    def __init__(self, address: str | None = None) -> None:
        """Connect. `address`: http(s)://HOST:PORT of the head's dashboard; absent: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

        The token is taken from RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names. Raises UnreachableError, and
        AuthenticationError, also when the request would go over the open internet without a token.
        """
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):  # they log every upload
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = _url_of(address)
        token = _token()
        check_open(self.address, token is not None)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with _errors(self.address):
            self._client: Any = _Client(self.address, headers)

    def submit(
        self, job_id: str, entrypoint: str, folder: Path, driver: DriverSpec, metadata: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        try:
            with _errors(self.address):
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(folder), "env_vars": dict(env)},
                    metadata=dict(metadata),
                    entrypoint_num_cpus=driver.cpus or None,
                    entrypoint_memory=driver.memory or None,
                    entrypoint_resources=dict(driver.resources) or None,
                    entrypoint_label_selector=dict(driver.labels) or None,
                )
        except ClusterError as error:
            if "already exists" in error.message:
                raise DuplicateJobError(f"a job {job_id} exists") from None
            raise

    def jobs(self) -> list[Job]:
        with _errors(self.address):
            return [_job(details) for details in self._client.list_jobs() if details.submission_id]

    def job(self, job_id: str) -> Job:
        with _errors(self.address, job_id):
            return _job(self._client.get_job_info(job_id))

    def log(self, job_id: str) -> str:
        with _errors(self.address, job_id):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        with _errors(self.address, job_id):
            return bool(self._client.stop_job(job_id))

    def nodes(self) -> list[NodeOffer]:
        with _errors(self.address):
            return [
                NodeOffer(node.get("resources_total") or {}, node.get("labels") or {})
                for node in self._client.list_nodes()
                if node.get("state") == "ALIVE"
            ]


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
    """Ray's client, with a time limit for every request, and always at the given address."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        SubmissionClient.__init__(self, address=url, headers=headers)  # the SDK's own lets RAY_ADDRESS override its argument
        self._client_ray_version = ray.__version__
        self._check_connection_and_version(min_version="2.52")

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        options.setdefault("timeout", _REQUEST_SECONDS)
        return super()._do_request(method, endpoint, **options)

    def list_nodes(self) -> list[dict[str, Any]]:
        answer = self._do_request("GET", "/api/v0/nodes?detail=1&limit=1000")
        if answer.status_code != 200:
            self._raise_error(answer)
        return list(answer.json()["data"]["result"]["result"])


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        state=str(details.status.value),
        message=details.message or "",
        error_type=str(details.error_type or ""),
        exit_code=details.driver_exit_code,
        metadata=details.metadata or {},
        submitted_at=details.start_time / 1000 if details.start_time else None,
        ended_at=details.end_time / 1000 if details.end_time else None,
        node=details.driver_node_id or "",
    )


@contextlib.contextmanager
def _errors(address: str, job_id: str = "") -> Iterator[None]:
    """Turn exceptions of requests and the SDK into our errors."""
    import requests
    from ray.exceptions import AuthenticationError as RayAuthenticationError

    try:
        yield
    except RayAuthenticationError as error:
        raise AuthenticationError(
            f"{address} refuses: {str(error).splitlines()[0]}",
            "Set RAY_AUTH_TOKEN to the cluster's token in this shell (or RAY_AUTH_TOKEN_PATH to a file with it).",
        ) from None
    except (requests.exceptions.RequestException, OSError) as error:
        raise UnreachableError(f"no answer from {address}: {_reason(error)}", _ADVICE) from None
    except RuntimeError as error:
        raise refusal(address, job_id, str(error)) from None


def refusal(address: str, job_id: str, text: str) -> Exception:
    """Return the error for an unsuccessful answer of Ray."""
    status, _, said = text.removeprefix("Request failed with status code ").partition(": ")
    said = said.strip().splitlines()[-1] if said.strip() else text
    if status == "404" and job_id:
        return UnknownSubmissionError(f"{address} has no job {job_id}", "`orchestrator list` shows its jobs.")
    if "No available agent" in text:
        return UnreachableError(
            f"{address} answers, but no node's agent takes the job",
            "If Ray has just started, try again. Else see dashboard_agent.log in Ray's log folder; a second Ray on a "
            "machine needs a different --dashboard-agent-listen-port.",
        )
    if status.startswith("5") and "already exists" not in text:
        return UnreachableError(f"{address} failed to answer ({status}): {said}")
    return ClusterError(f"{address} refused: {said}")


def _reason(error: BaseException) -> str:
    text = str(error)
    if text.startswith("Failed to connect"):  # the SDK's own text, which repeats the address
        return "no connection"
    return next((known for known in ("Connection refused", "timed out", "Name or service not known") if known in text), text)


def _token() -> str | None:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    if path and Path(path).is_file():
        return Path(path).read_text().strip()
    return None


def _url_of(address: str | None) -> str:
    """Return the URL of the job API. Raises UnreachableError."""
    given = address or next((value for name in _ADDRESS_VARIABLES if (value := os.environ.get(name))), None)
    if given is None:
        raise UnreachableError("no cluster was given", f"Pass --address, or set {' or '.join(_ADDRESS_VARIABLES)}. {_ADVICE}")
    if given.startswith(("http://", "https://")):
        return given.rstrip("/")
    if address is not None and "://" not in address and address != "auto":
        return f"http://{address}".rstrip("/")
    try:  # the cluster's own address, as inside a job: Ray knows its dashboard
        return str(get_address_for_submission_client(given))
    except Exception as error:
        raise UnreachableError(f"no Ray cluster answers at {given}: {_reason(error)}", _ADVICE) from None


def check_open(url: str, has_token: bool) -> None:
    """Refuse connections that let anyone on the network run code there. Raises AuthenticationError, UnreachableError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or has_token or parts.hostname is None:
        return
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise UnreachableError(f"{parts.hostname} has no address: {error.strerror}", _ADVICE) from None
    public = [text for text in found if ipaddress.ip_address(str(text).partition("%")[0]).is_global]
    if public:
        raise AuthenticationError(
            f"{url} is a public address ({public[0]}), and there is no token: whoever reaches it can run code there",
            "Start the cluster with RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN here; better, close the port and go through ssh -L.",
        )


def is_here(url: str) -> bool:
    """Whether the address is this machine's loopback, so that local files exist on the head too."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def unmet(driver: DriverSpec, nodes: list[NodeOffer]) -> str:
    """Return why a driver waits: no node has the resources, or nodes that have them are busy."""
    wanted = {"CPU": driver.cpus, "memory": float(driver.memory), **driver.resources}
    asked = [f"{amount:g} {name}" for name, amount in wanted.items() if amount]
    asked += [f"{name}: {value}" for name, value in driver.labels.items()]
    for node in nodes:
        if selects(driver.labels, node.labels) and all(node.resources.get(name, 0) >= amount for name, amount in wanted.items()):
            return f"a node has what the driver asks for ({', '.join(asked) or 'nothing'}), but other work holds it"
    return f"none of {len(nodes)} nodes has what the driver asks for: {', '.join(asked)}"
