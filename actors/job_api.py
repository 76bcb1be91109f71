"""Ray's job API, reduced to the calls that submissions need. Each request has a time limit, each failure is an error of ours.

The only place that knows Ray's REST API for jobs. It needs no Ray on this machine, so that the base install can submit. It polls,
because Ray's own log streaming ends healthy builds.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import json
import os
import signal
import socket
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

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
from orchestrator.scheduling.placement import selects
from orchestrator.spec.cluster import DriverSpec

_REQUEST_SECONDS = 30.0
_OK, _MISSING, _SERVER_ERROR = 200, 404, 500
_DENIED = (401, 403)
_OLDEST_RAY = (2, 52)
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""Fixed time of all files: equal folders make equal packages."""
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


class JobApi:
    """Calls of submissions to a cluster. Raises UnreachableError, AuthenticationError, UnknownSubmissionError."""

    def __init__(self, address: str | None = None) -> None:
        """Connect. `address`: http(s)://HOST:PORT of the head's dashboard; absent: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

        The token is taken from RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names (with
        RAY_AUTH_MODE=token also from Ray's ~/.ray/auth_token). Raises UnreachableError, ClusterError for an old Ray, and
        AuthenticationError, also when the request would go over the open internet without a token.
        """
        self.address = _url_of(address)
        token = _token()
        check_open(self.address, token is not None)
        # Redirects are not followed: they would carry the token to another host. Between polls no connection stays open.
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.address, headers=headers, timeout=_REQUEST_SECONDS, limits=limits)
        version = str(self._ask("GET", "/api/version")["ray_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_RAY:
            raise ClusterError(f"{self.address} runs Ray {version}", "Submit to a cluster with Ray 2.52 or newer.")

    def submit(
        self, job_id: str, entrypoint: str, folder: Path, driver: DriverSpec, metadata: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        """Upload `folder` as the working directory and submit. Raises DuplicateJobError."""
        fields = {
            "entrypoint": entrypoint,
            "submission_id": job_id,
            "runtime_env": {"working_dir": self._uploaded(folder), "env_vars": dict(env)},
            "metadata": dict(metadata),
            "entrypoint_num_cpus": driver.cpus or None,
            "entrypoint_memory": driver.memory or None,
            "entrypoint_resources": dict(driver.resources) or None,
            "entrypoint_label_selector": dict(driver.labels) or None,
        }
        body = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        status, text = self._request("POST", "/api/jobs/", body)
        if "already exists" in text and status != _OK:
            raise DuplicateJobError(f"a job {job_id} exists")
        if status != _OK:
            raise refusal(self.address, "", status, text)

    def jobs(self) -> list[Job]:
        return [_job(details) for details in self._ask("GET", "/api/jobs/") if details["submission_id"]]

    def job(self, job_id: str) -> Job:
        return _job(self._ask("GET", f"/api/jobs/{quote(job_id)}", job_id))

    def log(self, job_id: str) -> str:
        """Return everything that the job has printed so far."""
        return str(self._ask("GET", f"/api/jobs/{quote(job_id)}/logs", job_id)["logs"])

    def stop(self, job_id: str) -> bool:
        """Request the job's end; False when it has already ended. A pending job ends when it starts."""
        return bool(self._ask("POST", f"/api/jobs/{quote(job_id)}/stop", job_id)["stopped"])

    def nodes(self) -> list[NodeOffer]:
        answer = self._ask("GET", "/api/v0/nodes?detail=1&limit=1000")
        return [
            NodeOffer(node.get("resources_total") or {}, node.get("labels") or {})
            for node in answer["data"]["result"]["result"]
            if node.get("state") == "ALIVE"
        ]

    def _uploaded(self, folder: Path) -> str:
        """Return the URI of `folder` as a package in the cluster, uploading it if it is missing."""
        data = package(folder)
        name = f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip"
        path = f"/api/packages/gcs/{name}"
        status, text = self._request("GET", path)
        if status == _MISSING:
            status, text = self._request("PUT", path, data)
        if status != _OK:
            raise refusal(self.address, "", status, text)
        return f"gcs://{name}"

    def _ask(self, method: str, path: str, job_id: str = "") -> Any:
        """Request JSON. Raises the error of `refusal` for an unsuccessful status."""
        status, text = self._request(method, path)
        if status != _OK:
            raise refusal(self.address, job_id, status, text)
        try:
            return json.loads(text)
        except ValueError:
            raise UnreachableError(f"the server at {self.address} is not Ray's dashboard", _ADVICE) from None

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
        """Request and return status and text. Raises UnreachableError, AuthenticationError."""
        try:
            answer = self._client.request(method, path, content=body)
        except httpx.HTTPError as error:
            raise UnreachableError(f"no answer from {self.address}: {_reason(error)}", _ADVICE) from None
        return answer.status_code, answer.text


def package(folder: Path) -> bytes:
    """Return a zip file of `folder`'s files, as Ray unpacks a working directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix(), _ZIP_TIME), path.read_bytes())
    return buffer.getvalue()


def _job(details: Mapping[str, Any]) -> Job:
    began, ended = details.get("start_time"), details.get("end_time")
    return Job(
        id=details["submission_id"],
        state=str(details["status"]),
        message=details.get("message") or "",
        error_type=str(details.get("error_type") or ""),
        exit_code=details.get("driver_exit_code"),
        metadata=details.get("metadata") or {},
        submitted_at=began / 1000 if began else None,
        ended_at=ended / 1000 if ended else None,
        node=details.get("driver_node_id") or "",
    )


def refusal(address: str, job_id: str, status: int, text: str) -> Exception:
    """Return the error for an unsuccessful answer of Ray."""
    reason = text.strip().splitlines()[-1] if text.strip() else str(status)
    if status in _DENIED:
        return AuthenticationError(
            f"{address} refuses: {reason}",
            "Set RAY_AUTH_TOKEN to the cluster's token in this shell (or RAY_AUTH_TOKEN_PATH to a file with it).",
        )
    if status == _MISSING and job_id:
        return UnknownSubmissionError(f"{address} has no job {job_id}", "`orchestrator list` shows its jobs.")
    if "No available agent" in text:
        return UnreachableError(
            f"{address} answers, but no node's agent takes the job",
            "If Ray has just started, try again. Else see dashboard_agent.log in Ray's log folder; a second Ray on a "
            "machine needs a different --dashboard-agent-listen-port.",
        )
    if status >= _SERVER_ERROR:
        return UnreachableError(f"{address} failed to answer ({status}): {reason}")
    return ClusterError(f"{address} refused: {reason}")


def _reason(error: BaseException) -> str:
    text = str(error)
    return next((known for known in ("Connection refused", "timed out", "Name or service not known") if known in text), text)


def _token() -> str | None:
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    usual = "~/.ray/auth_token" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or usual).expanduser()
    return path.read_text().strip() if path.is_file() else None


def _url_of(address: str | None) -> str:
    """Return the URL of the job API. Raises UnreachableError."""
    given = address or next((value for name in _ADDRESS_VARIABLES if (value := os.environ.get(name))), None)
    if given is None:
        raise UnreachableError("no cluster was given", f"Pass --address, or set {' or '.join(_ADDRESS_VARIABLES)}. {_ADVICE}")
    if given.startswith(("http://", "https://")):
        return given.rstrip("/")
    if address is not None and "://" not in address and address != "auto":
        return f"http://{address}".rstrip("/")
    from ray.dashboard.utils import get_address_for_submission_client

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
            f"{url} is a public address ({public[0]}), but no token is set: anyone who reaches it can run code there",
            "Start the cluster with RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN here; better, close the port and use ssh -L.",
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
