"""What submissions decide, on a cluster that is played: attach or anew, how long to wait, what an end means, what travels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from actors.job_api import DuplicateJobError, Job, NodeOffer, check_open, refusal, unmet
from actors.jobs import Client, RaySubmission, choose
from orchestrator.base.errors import (
    AuthenticationError,
    CancelledError,
    DriverLostError,
    NotStartedError,
    SpecError,
    TerminatedError,
    TopologyError,
    UnknownSubmissionError,
    UnreachableError,
)
from orchestrator.cli.commands import app
from orchestrator.events import Published, StepRetried, StepsFinished
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, DriverSpec
from orchestrator.spec.decoding import decode
from orchestrator.spec.loading import load_spec
from orchestrator.submit.bundle import ENTRYPOINT, submission_id
from orchestrator.submit.protocol import Clock

PLACE = ClusterSpec(kind="ray", store="s3://bucket", address="ray://elsewhere:10001")
PUBLISHED = json.dumps({"event": "published", "manifest": "s3://bucket/m.json", "steps_run": 2, "verification": None})
LOG = [
    '{"event": "retry", "digest": "d", "attempt": 2, "delay_seconds": 1.0}',
    "a library speaks",
    '{"event": "finish", "ran": []}',
]


def test_refusal_of_a_cluster_whose_agents_are_away_does_not_blame_the_address() -> None:
    error = refusal("http://head:8265", "", 500, '{"msg": "No available agent to submit job, please try again later."}')
    assert isinstance(error, UnreachableError)
    assert error.message == "http://head:8265 answers, but no node's agent takes the job"
    assert "dashboard_agent.log" in error.advice


@pytest.fixture
def spec() -> BuildSpec:
    plain = {"source": {"path": "s3://models/llama"}, "topology": {"tp": 2}, "release": {"name": "llama", "version": "1"}}
    return decode(BuildSpec, plain, "test")


@dataclass
class FakeClock:
    """Time that passes only by waiting."""

    time: float = 0.0

    def clock(self) -> Clock:
        return Clock(lambda: self.time, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@dataclass
class FakeApi:
    """A cluster whose jobs come on by one entry of their script whenever their state is asked for."""

    address: str = "http://head:8265"
    known: dict[str, Job] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    script: list[tuple[str, str]] = field(default_factory=list)
    """(state, what is printed then); the last one stays."""
    faults: list[Exception] = field(default_factory=list)
    """Raised by the next requests."""
    submitted: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of the working directory, by job."""
    environment: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    rivals: int = 0
    """How many submissions find that somebody else was faster."""

    def submit(
        self, job_id: str, entrypoint: str, folder: Path, driver: DriverSpec, metadata: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        assert entrypoint == ENTRYPOINT
        self.known[job_id] = Job(job_id, "PENDING", metadata=metadata)
        if self.rivals:
            self.rivals -= 1
            raise DuplicateJobError("exists")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.submitted[job_id] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        self.environment = dict(env)

    def jobs(self) -> list[Job]:
        return list(self.known.values())

    def job(self, job_id: str) -> Job:
        if self.faults:
            raise self.faults.pop(0)
        if job_id not in self.known:
            raise UnknownSubmissionError(f"no {job_id}")
        if self.script:
            state, text = self.script.pop(0)
            self.known[job_id] = replace(self.known[job_id], state=state)
            self.printed[job_id] = self.printed.get(job_id, "") + text
        return self.known[job_id]

    def log(self, job_id: str) -> str:
        if self.faults:
            raise self.faults.pop(0)
        return self.printed.get(job_id, "")

    def stop(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    def nodes(self) -> list[NodeOffer]:
        return [NodeOffer({"CPU": 4.0}, {"role": "worker"})]


def submitted(api: FakeApi, spec: BuildSpec, clock: FakeClock | None = None, **options: float) -> RaySubmission:
    return Client(api=api, clock=(clock or FakeClock()).clock()).submit(spec, PLACE, **options)  # type: ignore[arg-type]


def lost() -> UnreachableError:
    return UnreachableError("no answer")


# Attach or anew


@pytest.mark.parametrize(
    ("states", "chosen", "attach"),
    [
        ([], "b", False),
        (["RUNNING"], "b", True),
        (["SUCCEEDED"], "b", True),
        (["PENDING"], "b", True),
        (["FAILED"], "b-2", False),
        (["STOPPED"], "b-2", False),
        (["FAILED", "RUNNING"], "b-2", True),
        (["FAILED"] * 10, "b-11", False),
    ],
)
def test_choose_attaches_to_what_runs_or_has_succeeded(states: list[str], chosen: str, attach: bool) -> None:
    driver = json.dumps(DriverSpec().model_dump(mode="json", exclude={"stop_seconds"}), sort_keys=True)
    ids = ["b", *(f"b-{number}" for number in range(2, len(states) + 1))]
    jobs = [Job(job_id, state, metadata={"driver": driver}) for job_id, state in zip(ids, states, strict=False)]
    others = [Job("b-other", "RUNNING"), Job("c", "RUNNING")]
    choice = choose("b", DriverSpec(), [*others, *reversed(jobs)])
    assert (choice.job_id, choice.attach, choice.withdraw) == (chosen, attach, "")


def test_submit_with_another_place_for_the_driver_withdraws_the_pending_job(spec: BuildSpec) -> None:
    api = FakeApi()
    first = submitted(api, spec)
    client = Client(api=api, clock=FakeClock().clock())
    second = client.submit(spec, PLACE, driver=DriverSpec(cpus=0.1, labels={"role": "worker"}))
    assert (first.attached, second.attached) == (False, False)
    assert second.id == f"{first.id}-2"
    assert api.stopped == [first.id]


def test_submit_of_the_same_build_again_attaches(spec: BuildSpec) -> None:
    api = FakeApi()
    first, second = submitted(api, spec), submitted(api, spec)
    assert (first.attached, second.attached) == (False, True)
    assert first.id == second.id == submission_id(spec, PLACE)
    assert list(api.submitted) == [first.id]


def test_submit_when_another_was_faster_attaches_to_the_other_s(spec: BuildSpec) -> None:
    api = FakeApi(rivals=1)
    assert submitted(api, spec).attached
    assert not api.submitted


def test_submit_of_a_cluster_file_of_another_kind_is_refused(spec: BuildSpec) -> None:
    with pytest.raises(SpecError, match="kind local"):
        Client(api=FakeApi()).submit(spec, ClusterSpec(store="s3://bucket"))


def test_submit_sends_spec_and_cluster_whose_driver_finds_its_own_cluster(spec: BuildSpec) -> None:
    api = FakeApi()
    job = submitted(api, spec)
    files = api.submitted[job.id]
    assert set(files) == {"spec.yaml", "cluster.yaml", "build.sh"}
    assert yaml.safe_load(files["cluster.yaml"])["address"] == "auto"
    assert api.environment == {"RAY_JOB_STOP_WAIT_TIME_S": "30"}


def test_submit_sends_the_calibration_file_and_a_spec_that_names_the_copy(spec: BuildSpec, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text('{"text": "one"}')
    fields = {**spec.model_dump(mode="json", exclude_unset=True)}
    fields["quantization"] = {"algorithm": "FP8", "calibration": {"dataset": str(data)}}
    api = FakeApi()
    job = submitted(api, decode(BuildSpec, fields, "test"))
    files = api.submitted[job.id]
    named = yaml.safe_load(files["spec.yaml"])["quantization"]["calibration"]["dataset"]
    assert files[named] == data.read_bytes()


def test_submit_takes_no_secret_of_this_machine(spec: BuildSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "planted-key", "RAY_AUTH_TOKEN": "planted-token", "HF_TOKEN": "planted-hf"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    api = FakeApi()
    job = submitted(api, spec)
    sent = repr((api.submitted, api.environment, api.known[job.id]))
    assert "planted" not in sent


def test_warnings_from_another_machine_name_what_every_node_must_have(spec: BuildSpec) -> None:
    place = PLACE.model_copy(update={"store": "file:///shared"})
    far, here = FakeApi(), FakeApi(address="http://127.0.0.1:8265")
    assert len(Client(api=far).submit(spec, place).warnings) == 1
    assert Client(api=here).submit(spec, place).warnings == ()


# Following


def test_events_come_once_and_in_order_however_the_log_grows(spec: BuildSpec) -> None:
    half = LOG[0][:9]
    script = [
        ("PENDING", ""),
        ("RUNNING", half),
        ("RUNNING", LOG[0][9:] + "\n" + LOG[1]),
        ("SUCCEEDED", f"\n{LOG[2]}\n{PUBLISHED}"),
    ]
    found = list(submitted(FakeApi(script=script), spec).events())
    assert [type(event) for event in found] == [StepRetried, StepsFinished, Published]


def test_events_go_on_after_broken_polls(spec: BuildSpec) -> None:
    api = FakeApi(script=[("RUNNING", LOG[0] + "\n"), ("SUCCEEDED", PUBLISHED + "\n")])
    job, clock = submitted(api, spec), FakeClock()
    api.faults = [lost() for _ in range(100)]
    job._clock = clock.clock()
    assert [type(event) for event in job.events()] == [StepRetried, Published]
    assert clock.time < 600


def test_events_of_a_cluster_that_stays_silent_end_with_unreachable(spec: BuildSpec) -> None:
    api, clock = FakeApi(), FakeClock()
    job = submitted(api, spec, clock)
    api.faults = [lost() for _ in range(10_000)]
    with pytest.raises(UnreachableError, match="for 600 s"):
        list(job.events())
    assert 600 <= clock.time < 610


def test_events_of_a_job_pending_for_ever_end_with_the_reason(spec: BuildSpec) -> None:
    clock = FakeClock()
    job = Client(api=FakeApi(), clock=clock.clock()).submit(
        spec, PLACE, driver=DriverSpec(resources={"driver": 1}), start_seconds=60
    )
    with pytest.raises(NotStartedError, match="in 60 s: none of 1 nodes has what the driver asks for: 1 driver"):
        job.result()
    assert 60 <= clock.time < 65


def test_events_of_a_job_that_started_late_have_no_deadline(spec: BuildSpec) -> None:
    api = FakeApi(script=[*([("PENDING", "")] * 50), *([("RUNNING", "")] * 50), ("SUCCEEDED", PUBLISHED)])
    assert submitted(api, spec, start_seconds=60).result().steps_run == 2


def test_result_that_does_not_come_in_time_is_a_timeout(spec: BuildSpec) -> None:
    clock = FakeClock()
    with pytest.raises(TimeoutError):
        submitted(FakeApi(script=[("RUNNING", "")]), spec, clock).result(timeout_seconds=30)
    assert clock.time == pytest.approx(30, abs=1.5)


def test_poll_that_takes_long_is_made_less_often(spec: BuildSpec) -> None:
    api, clock = FakeApi(script=[("RUNNING", "")] * 10 + [("SUCCEEDED", PUBLISHED)]), FakeClock()
    job = submitted(api, spec, clock)
    quick = api.log

    def slow(job_id: str) -> str:
        clock.sleep(4.0)
        return quick(job_id)

    api.log = slow  # type: ignore[method-assign]
    job.result()
    assert clock.time == pytest.approx(11 * 4 + 10 * 40)


# What an end means


def ended(spec: BuildSpec, state: str, text: str, **changes: object) -> RaySubmission:
    api = FakeApi(script=[(state, text)])
    job = submitted(api, spec)
    api.known[job.id] = replace(api.known[job.id], **changes)  # type: ignore[arg-type]
    return job


def test_result_is_the_build_s_own_error(spec: BuildSpec) -> None:
    line = json.dumps({"event": "error", "error": "TopologyError", "message": "tp=3", "advice": "tp in {1, 2}", "exit_code": 11})
    with pytest.raises(TopologyError, match="tp=3") as caught:
        ended(spec, "FAILED", line).result()
    assert caught.value.advice == "tp in {1, 2}"


def test_result_of_a_stopped_job_is_cancelled(spec: BuildSpec) -> None:
    with pytest.raises(CancelledError):
        ended(spec, "STOPPED", "").result()


def test_result_of_a_killed_driver_says_its_last_lines(spec: BuildSpec) -> None:
    with pytest.raises(DriverLostError, match=r"(?s)exit code 1; .*No module named 'orchestrator'"):
        ended(spec, "FAILED", "python: No module named 'orchestrator'\n", exit_code=1).result()


@pytest.mark.parametrize("error_type", ["RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"])
def test_result_of_a_job_that_could_not_start_says_why(spec: BuildSpec, error_type: str) -> None:
    with pytest.raises(NotStartedError, match="no disk"):
        ended(spec, "FAILED", "", error_type=error_type, message="no disk").result()


def test_result_whose_log_is_lost_is_read_from_what_ray_kept(spec: BuildSpec) -> None:
    line = json.dumps({"event": "error", "error": "TopologyError", "message": "tp=3", "advice": "", "exit_code": 11})
    api = FakeApi()
    job = submitted(api, spec)
    api.known[job.id] = replace(api.known[job.id], state="FAILED", message=f"failed with exit code 11, last logs:\n{line}\n")

    def gone(job_id: str) -> str:
        raise lost()

    api.log = gone  # type: ignore[method-assign]
    with pytest.raises(TopologyError, match="tp=3"):
        job.result()
    api.known[job.id] = replace(api.known[job.id], state="SUCCEEDED", message="Job finished successfully.")
    made = Client(api=api, clock=FakeClock().clock()).attach(job.id).result()
    assert made == Published(manifest="s3://bucket/releases/llama/1/manifest.json", time=made.time)


def test_job_that_the_cluster_forgot_is_a_lost_driver(spec: BuildSpec) -> None:
    api = FakeApi()
    job = submitted(api, spec)
    api.known.clear()
    with pytest.raises(DriverLostError, match="has forgotten"):
        job.result()


def test_cancel_waits_for_the_end_and_tells_a_pending_one(spec: BuildSpec) -> None:
    api = FakeApi(script=[("RUNNING", ""), ("RUNNING", ""), ("STOPPED", "")])
    job = submitted(api, spec)
    assert job.cancel().state == "STOPPED"
    assert api.stopped == [job.id]
    assert submitted(FakeApi(), spec).cancel(wait_seconds=5).state == "PENDING"


def test_attach_to_an_unknown_job_is_refused() -> None:
    with pytest.raises(UnknownSubmissionError):
        Client(api=FakeApi()).attach("build-x")


def test_list_leaves_out_jobs_of_others(spec: BuildSpec) -> None:
    api = FakeApi(known={"raysubmit_1": Job("raysubmit_1", "RUNNING")})
    job = submitted(api, spec)
    assert [found.id for found in Client(api=api).list()] == [job.id]


# Addresses and places


@pytest.mark.parametrize("url", ["http://8.8.8.8:8265", "http://[2001:4860:4860::8888]:8265"])
def test_check_open_public_address_without_a_token_is_refused(url: str) -> None:
    with pytest.raises(AuthenticationError, match="public address"):
        check_open(url, has_token=False)
    check_open(url, has_token=True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8265", "http://10.0.0.7:8265", "http://192.168.1.1", "https://8.8.8.8"])
def test_check_open_other_addresses_pass(url: str) -> None:
    check_open(url, has_token=False)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (DriverSpec(cpus=8), "none of 1 nodes has what the driver asks for: 8 CPU"),
        (DriverSpec(labels={"role": "head"}), "none of 1 nodes has what the driver asks for: role: head"),
        (DriverSpec(cpus=4, labels={"role": "worker"}), "but other work holds it"),
    ],
)
def test_unmet_says_what_no_node_has(driver: DriverSpec, reason: str) -> None:
    assert reason in unmet(driver, FakeApi().nodes())


# On the command line


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump({"source": {"path": "s3://m/l"}, "release": {"name": "llama", "version": "1"}})
    )
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"kind": "ray", "store": "s3://bucket"}))
    return [str(tmp_path / "spec.yaml"), "--cluster", str(tmp_path / "cluster.yaml")]


def invoked(monkeypatch: pytest.MonkeyPatch, api: FakeApi, *words: str, clock: Clock | None = None) -> Result:
    client = Client(api=api, clock=clock or FakeClock().clock())
    monkeypatch.setattr("orchestrator.cli.jobs._client", lambda address: client)
    return CliRunner().invoke(app, list(words))


ERROR = json.dumps({"event": "error", "error": "TopologyError", "message": "tp=3", "advice": "tp in {1, 2}", "exit_code": 11})


def test_cli_submit_and_follow_ends_with_the_build_s_exit_code(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    bad = invoked(monkeypatch, FakeApi(script=[("RUNNING", ""), ("FAILED", ERROR)]), "submit", *files, "--follow")
    assert (bad.exit_code, "tp in {1, 2}" in bad.stderr) == (TopologyError.exit_code, True)
    good = invoked(monkeypatch, FakeApi(script=[("SUCCEEDED", PUBLISHED)]), "submit", *files, "--follow")
    assert (good.exit_code, "published: s3://bucket/m.json" in good.stdout) == (0, True)


def test_cli_submit_and_follow_as_json_passes_the_driver_s_lines_on(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    api = FakeApi(script=[("RUNNING", "\n".join(LOG) + "\n"), ("FAILED", ERROR)])
    result = invoked(monkeypatch, api, "submit", *files, "--follow", "--json")
    assert [json.loads(line)["event"] for line in result.stdout.splitlines()] == ["submitted", "retry", "finish", "error"]
    assert result.exit_code == TopologyError.exit_code


@pytest.mark.parametrize("command", ["submit", "logs"])
def test_cli_ctrl_c_only_looks_away(monkeypatch: pytest.MonkeyPatch, files: list[str], command: str) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    api = FakeApi(script=[("RUNNING", "")])
    job = submitted(api, load_spec(Path(files[0])))
    words = ["submit", *files] if command == "submit" else ["logs", job.id]
    result = invoked(monkeypatch, api, *words, "--follow", clock=Clock(lambda: 0.0, interrupt))
    assert result.exit_code == CancelledError.exit_code
    assert f"orchestrator logs {job.id} --follow --address http://head:8265" in result.stdout
    assert not api.stopped


def test_cli_stop_says_how_it_ended(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    api = FakeApi(script=[("RUNNING", ""), ("RUNNING", ""), ("STOPPED", "")])
    job = submitted(api, load_spec(Path(files[0])))
    result = invoked(monkeypatch, api, "stop", job.id)
    assert (result.exit_code, f"{job.id}: STOPPED" in result.stdout, api.stopped) == (0, True, [job.id])


def test_cli_status_and_list_as_json_say_the_same(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    api = FakeApi()
    job = submitted(api, load_spec(Path(files[0])))
    one = json.loads(invoked(monkeypatch, api, "status", job.id, "--json").stdout)
    assert json.loads(invoked(monkeypatch, api, "list", "--json").stdout) == {"jobs": [one]}
    assert (one["id"], one["state"], one["release"]) == (job.id, "PENDING", "llama 1")


def test_cli_unknown_job_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoked(monkeypatch, FakeApi(), "status", "build-x").exit_code == UnknownSubmissionError.exit_code


def test_cli_address_that_nobody_answers_has_its_exit_code() -> None:
    result = CliRunner().invoke(app, ["list", "--address", "http://127.0.0.1:9"])
    assert (result.exit_code, "http://HOST:8265" in result.stderr) == (UnreachableError.exit_code, True)


@pytest.mark.parametrize(
    ("state", "code", "shown"),
    [
        ("FAILED", -9, DriverLostError.exit_code),
        ("FAILED", 137, DriverLostError.exit_code),
        ("FAILED", 1, DriverLostError.exit_code),
        ("FAILED", None, DriverLostError.exit_code),
        ("FAILED", 11, TopologyError.exit_code),
        ("STOPPED", -15, TerminatedError.exit_code),
        ("STOPPED", None, TerminatedError.exit_code),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
    ],
)
def test_cli_status_shows_the_exit_code_that_following_ends_with(
    monkeypatch: pytest.MonkeyPatch, files: list[str], state: str, code: int | None, shown: int | None
) -> None:
    api = FakeApi(script=[])
    job = submitted(api, load_spec(Path(files[0])))
    api.known[job.id] = replace(api.known[job.id], state=state, exit_code=code, message="Job entrypoint command failed")
    said = json.loads(invoked(monkeypatch, api, "status", job.id, "--json").stdout)
    assert said["exit_code"] == shown
    assert (said["message"] == "the driver was ended by SIGKILL") == (code == -9)
    if state in ("FAILED", "STOPPED") and code != 11:
        assert invoked(monkeypatch, api, "logs", job.id, "--follow").exit_code == shown
