"""`orchestrator k8s` on the command line, with an API server in memory: words for people, JSON for machines, exit codes."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.base.errors import (
    CancelledError,
    DriverLostError,
    SpecError,
    StoreError,
    UnknownSubmissionError,
    VerificationError,
)
from orchestrator.cli.commands import app
from orchestrator.events import Errored, Event, Planned
from orchestrator.report.journal import Journal
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.submit.kubernetes.builds import Timing
from orchestrator.submit.protocol import Clock
from tests.contracts.kubernetes_contract import SPEC
from tests.support.fake_kubernetes import FakeKubernetes
from tests.support.kuberay_operator import Driver, Operator, error_line, ray_failure

NAME = ("--name", "mine")
BEFORE, AFTER = datetime.datetime(2025, 12, 31, tzinfo=datetime.UTC), datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
"""The RayJobs of the fake are made on the day between."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """What stands for the builds' store."""
    found = open_store((tmp_path / "store").as_uri())
    monkeypatch.setattr("orchestrator.submit.kubernetes.progress.open_store", lambda url, options: found)
    return found


@pytest.fixture
def operator(store: Store, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """A cluster that the commands find, whose operator acts while they wait."""
    fake = FakeKubernetes()
    operator = Operator(fake, fake.now)
    fake.idle = operator.step
    timing = Timing(clock=Clock(fake.now, fake.sleep))
    monkeypatch.setattr("orchestrator.submit.kubernetes.api.KubernetesApi", lambda context: fake)
    monkeypatch.setattr("orchestrator.submit.kubernetes.builds.Timing", lambda: timing)
    return operator


def write_run(store: Store, at: datetime.datetime, *events: Event, release: str = "llama/1") -> None:
    """What a driver that began at a moment wrote to the store."""
    journal = Journal(store, "0" * 64, at.timestamp)
    pending = ("convert/stage0/group0",)
    planned = Planned(steps=2, pending=pending, build_key="0" * 64, already_published=False, release=release)
    for event in (planned, *events):
        journal.tell(event)
    journal.flush()


@pytest.fixture
def submission(tmp_path: Path) -> list[str]:
    """The words of a submission."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(SPEC))
    return ["submit", str(spec), "--overlay", "cpu-aot", "--store", "s3://mine/builds", "--image", "registry.test/x:1", *NAME]


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["k8s", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_submit_build_that_succeeds_ends_with_its_release(operator: Operator, submission: list[str]) -> None:
    code, text = run(*submission)
    assert code == 0
    assert text.splitlines()[0] == "mine submitted, namespace trt-builds"
    assert text.splitlines()[-1] == "published: s3://mine/builds/releases/llama/1/manifest.json"
    assert "mine: running (mine-0)" in text


def test_submit_again_says_that_it_attached(operator: Operator, submission: list[str]) -> None:
    run(*submission)
    code, text = run(*submission)
    assert code == 0
    assert text.startswith("mine was submitted before: attached to it")


def test_submit_build_that_fails_ends_with_its_exit_code(operator: Operator, submission: list[str]) -> None:
    operator.drivers["mine"] = Driver("fails", ray_failure(24, error_line("VerificationError", 24, "rank 1 is wrong")))
    code, text = run(*submission)
    assert code == VerificationError.exit_code
    assert "error: rank 1 is wrong" in text
    assert "mine: waiting, attempt 3" in text


def test_submit_as_json_says_states_and_the_error(operator: Operator, submission: list[str]) -> None:
    operator.drivers["mine"] = Driver("fails", ray_failure(24, error_line("VerificationError", 24)))
    code, text = run(*submission, "--json")
    events = [json.loads(line) for line in text.splitlines()]
    assert code == 24
    assert events[0] == {"event": "submitted", "name": "mine", "namespace": "trt-builds", "attached": False}
    assert [event["state"] for event in events if event["event"] == "state"][-1] == "failed"
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("error", 24)


def test_submit_detached_status_list_and_stop(operator: Operator, submission: list[str]) -> None:
    operator.drivers["mine"] = Driver("runs")
    assert run(*submission, "--detach") == (0, "mine submitted, namespace trt-builds\n")
    for _ in range(5):
        operator.step()
    code, text = run("status", "mine")
    assert code == 0
    assert "state        running" in text
    code, text = run("list", "--json")
    (build,) = json.loads(text)["builds"]
    assert (build["name"], build["state"], build["release"]) == ("mine", "running", "s3://mine/builds/releases/llama/1")
    assert run("stop", "mine") == (0, "stopping mine\nmine is gone (was: running)\n")
    assert run("status", "mine")[0] == UnknownSubmissionError.exit_code


def test_submit_image_of_the_examples_is_refused_before_anything_is_made(operator: Operator, submission: list[str]) -> None:
    words = submission[: submission.index("--image")]
    code, text = run(*words)
    assert code == SpecError.exit_code
    assert "--image" in text
    assert operator.admin.jobs() == []


def test_submit_interrupted_only_looks_away(operator: Operator, submission: list[str]) -> None:
    operator.drivers["mine"] = Driver("runs")
    fake = operator.admin
    assert isinstance(fake, FakeKubernetes)

    def interrupt() -> None:
        operator.step()
        if fake.now() > 5:
            raise KeyboardInterrupt

    fake.idle = interrupt
    code, text = run(*submission)
    assert code == CancelledError.exit_code
    assert "orchestrator k8s stop mine -n trt-builds" in text
    assert len(operator.admin.jobs()) == 1


def test_submit_shows_the_events_of_its_own_driver(operator: Operator, submission: list[str], store: Store) -> None:
    write_run(store, BEFORE, Errored(error="StoreError", message="of an older run", advice="", exit_code=17))
    write_run(store, AFTER, release="other/1")
    write_run(store, AFTER)
    code, text = run(*submission)
    assert code == 0
    assert text.count("2 steps, 1 committed or not needed, 1 to run.") == 1
    assert "older run" not in text


def test_submit_last_word_in_the_store_is_the_builds_error(operator: Operator, submission: list[str], store: Store) -> None:
    operator.drivers["mine"] = Driver("fails", "the pod was gone before anyone could read its log")
    write_run(store, AFTER, Errored(error="VerificationError", message="rank 1 is wrong", advice="look", exit_code=24))
    code, text = run(*submission)
    assert code == VerificationError.exit_code
    assert "error: rank 1 is wrong" in text


def test_submit_as_json_passes_the_drivers_events_on(operator: Operator, submission: list[str], store: Store) -> None:
    write_run(store, AFTER)
    _, text = run(*submission, "--json")
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert {"submitted", "state", "plan", "published"} == set(events)
    assert events[-1] == "published"


def test_submit_store_that_cannot_be_read_from_here_is_told_once(
    operator: Operator, submission: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("no credentials")

    monkeypatch.setattr("orchestrator.submit.kubernetes.progress.find_run", refuse)
    code, text = run(*submission)
    assert code == 0
    assert text.count("the driver's events are not seen from here: no credentials") == 1


def test_logs_prints_the_drivers_events_and_the_end_of_its_log(operator: Operator, submission: list[str], store: Store) -> None:
    operator.drivers["mine"] = Driver("fails", ray_failure(1, "Traceback: a bug"))
    write_run(store, AFTER)
    run(*submission)
    code, text = run("logs", "mine")
    assert code == 0
    assert json.loads(text.splitlines()[0])["event"] == "plan"
    assert text.splitlines()[-1] == "Traceback: a bug"
    assert run("logs", "mine", "--follow")[0] == DriverLostError.exit_code
