"""The client of Ray's job API against a server that answers as Ray's dashboard does. With Ray: tests/integration/test_jobs.py."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from actors.job_api import DuplicateJobError, JobApi, package
from orchestrator.base.errors import AuthenticationError, ClusterError, OrchestratorError, UnknownSubmissionError, UnreachableError
from orchestrator.spec.cluster import DriverSpec

JOB = {
    "submission_id": "build-1", "status": "FAILED", "message": "m", "error_type": None, "driver_exit_code": 23,
    "metadata": {"a": "b"}, "start_time": 1000, "end_time": 2500, "driver_node_id": "n",
}  # fmt: skip


@dataclass
class Dashboard:
    """Answers by method and path, and what was asked."""

    address: str = ""
    answers: dict[str, tuple[int, Any]] = field(default_factory=lambda: {"GET /api/version": (200, {"ray_version": "2.60.0"})})
    asked: list[tuple[str, bytes, str | None]] = field(default_factory=list)


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    state = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            name = f"{self.command} {self.path}"
            state.asked.append((name, body, self.headers.get("Authorization")))
            status, said = state.answers.get(name, state.answers.get(f"{self.command} *", (404, "nothing")))
            if self.command == "PUT" and status == 200:
                state.answers[f"GET {self.path}"] = (200, "")
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"{state.address}/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = answer  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    (tmp_path / "spec.yaml").write_text("a: 1")
    (tmp_path / "below" / "data.txt").write_text("text")
    return tmp_path


def test_submit_uploads_the_folder_once_and_leaves_out_what_was_not_asked_for(dashboard: Dashboard, folder: Path) -> None:
    dashboard.answers |= {"PUT *": (200, ""), "POST /api/jobs/": (200, {"submission_id": "build-1"})}
    api = JobApi(dashboard.address)
    for _ in range(2):
        api.submit("build-1", "python x", folder, DriverSpec(cpus=0.5, labels={"pool": "cpu"}), {"m": "1"}, {"E": "2"})
    uploads = [(name, body) for name, body, _ in dashboard.asked if name.startswith("PUT")]
    assert len(uploads) == 1
    with zipfile.ZipFile(io.BytesIO(uploads[0][1])) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"below/data.txt": b"text", "spec.yaml": b"a: 1"}
    posted = [json.loads(body) for name, body, _ in dashboard.asked if name.startswith("POST")]
    uri = "gcs://" + uploads[0][0].rpartition("/")[2]
    assert posted[0] == posted[1] == {
        "entrypoint": "python x", "submission_id": "build-1", "metadata": {"m": "1"}, "entrypoint_num_cpus": 0.5,
        "runtime_env": {"working_dir": uri, "env_vars": {"E": "2"}}, "entrypoint_label_selector": {"pool": "cpu"},
    }  # fmt: skip


def test_package_of_equal_folders_is_the_same_and_of_others_is_not(folder: Path) -> None:
    first = package(folder)
    (folder / "spec.yaml").touch()
    assert package(folder) == first
    (folder / "spec.yaml").write_text("a: 2")
    assert package(folder) != first


def test_jobs_are_read_and_those_that_nobody_submitted_left_out(dashboard: Dashboard) -> None:
    dashboard.answers |= {
        "GET /api/jobs/": (200, [JOB, {**JOB, "submission_id": None}]),
        "GET /api/jobs/build-1/logs": (200, {"logs": "line\n"}),
        "POST /api/jobs/build-1/stop": (200, {"stopped": False}),
    }
    api = JobApi(dashboard.address)
    (job,) = api.jobs()
    assert (job.id, job.state, job.exit_code, job.submitted_at, job.ended_at, job.node) == ("build-1", "FAILED", 23, 1.0, 2.5, "n")
    assert api.log("build-1") == "line\n"
    assert api.stop("build-1") is False


def test_nodes_are_those_that_live(dashboard: Dashboard) -> None:
    nodes = [{"state": "ALIVE", "resources_total": {"CPU": 2}, "labels": {"a": "b"}}, {"state": "DEAD"}]
    dashboard.answers["GET /api/v0/nodes?detail=1&limit=1000"] = (200, {"data": {"result": {"result": nodes}}})
    (node,) = JobApi(dashboard.address).nodes()
    assert (node.resources, node.labels) == ({"CPU": 2}, {"a": "b"})


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((401, "Unauthorized"), AuthenticationError, "refuses: Unauthorized"),
        ((403, "Forbidden"), AuthenticationError, "refuses: Forbidden"),
        ((404, "Job does not exist"), UnknownSubmissionError, "has no job build-1"),
        ((400, "trace\nbad request"), ClusterError, "refused: bad request"),
        ((503, ""), UnreachableError, "failed to answer (503)"),
        ((302, ""), ClusterError, "refused: 302"),
        ((200, "<html>"), UnreachableError, "is not Ray's dashboard"),
    ],
)
def test_answer_that_is_no_success_is_an_error_of_ours(
    dashboard: Dashboard, answer: tuple[int, str], error: type[OrchestratorError], words: str
) -> None:
    dashboard.answers["GET /api/jobs/build-1"] = answer
    api = JobApi(dashboard.address)
    with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
        api.job("build-1")
    assert not [name for name, _, _ in dashboard.asked if "elsewhere" in name], "the token would follow a redirect"


def test_job_of_an_id_that_is_taken_is_a_duplicate(dashboard: Dashboard, folder: Path) -> None:
    dashboard.answers |= {
        "PUT *": (200, ""),
        "POST /api/jobs/": (500, "trace\nValueError: Job with submission_id x already exists"),
    }
    with pytest.raises(DuplicateJobError):
        JobApi(dashboard.address).submit("x", "python x", folder, DriverSpec(), {}, {})


def test_connect_old_ray_and_a_closed_port_are_refused(dashboard: Dashboard) -> None:
    dashboard.answers["GET /api/version"] = (200, {"ray_version": "2.9.3"})
    with pytest.raises(ClusterError, match=r"runs Ray 2\.9\.3"):
        JobApi(dashboard.address)
    with pytest.raises(UnreachableError, match="Connection refused"):
        JobApi("http://127.0.0.1:1")


@pytest.mark.parametrize("where", ["variable", "file", "usual file"])
def test_token_goes_with_every_request(dashboard: Dashboard, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard.answers["GET /api/jobs/"] = (200, [])
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret\n")
    if where == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    elif where == "file":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    else:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
    JobApi(dashboard.address).jobs()
    assert [token for _, _, token in dashboard.asked] == ["Bearer secret"] * 2
