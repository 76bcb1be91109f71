"""Builds handed over to real Ray nodes through the job API: they run, stop cleanly, go on, and carry no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from typer.testing import CliRunner

from actors import Client, RaySubmission
from orchestrator.base.errors import NotStartedError, TerminatedError, TopologyError
from orchestrator.cli.commands import app
from orchestrator.events import Errored, Planned, Published, StepEvent, StepsFinished, StepStarted, StepSucceeded
from orchestrator.planning.steps import Kind
from orchestrator.releases import read_release
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, DriverSpec
from orchestrator.stores import open_store
from orchestrator.submit.bundle import bundle
from tests.conftest import SpecMaker
from tests.support.ray_nodes import RayNodes, skip_reason

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())),
]

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "planted/secret/key/of/this/machine",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "HF_TOKEN": "hf_plantedplanted",
}
WORKER = DriverSpec(cpus=0.1, labels={"role": "worker"})


@pytest.fixture
def bed(ray_nodes: RayNodes) -> RayNodes:
    return ray_nodes


@pytest.fixture
def client(bed: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Of a machine with secrets in its environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_AUTH_TOKEN", "NO_PROXY"):
        monkeypatch.setenv(name, bed.environment[name])
    monkeypatch.setenv("no_proxy", bed.environment["NO_PROXY"])
    return Client(bed.dashboard)


@pytest.fixture
def place(bed: RayNodes) -> ClusterSpec:
    return ClusterSpec(kind="ray", store=f"{bed.store_url}/jobs", scratch=str(bed.scratch), driver=WORKER)


def tiny(make_spec: SpecMaker, source: Path, version: str, **sections: Any) -> BuildSpec:
    sections = {"verification": {"enabled": False}, "release": {"name": "jobs", "version": version}, **sections}
    return make_spec(source, **sections)


def asked(bed: RayNodes, path: str) -> bytes:
    """The head's answer, as raw as it is."""
    request = Request(bed.dashboard + path, headers={"Authorization": f"Bearer {bed.environment['RAY_AUTH_TOKEN']}"})
    with build_opener(ProxyHandler({})).open(request, timeout=20) as answer:
        return bytes(answer.read())


def living_actors(bed: RayNodes) -> set[str]:
    query = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
    found = json.loads(asked(bed, f"/api/v0/actors?{query}"))["data"]["result"]["result"]
    return {actor["class_name"] for actor in found}


def test_submitted_build_runs_on_a_worker_is_published_and_found_again(
    client: Client, bed: RayNodes, place: ClusterSpec, make_spec: SpecMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    mixture = tmp_path / "quant_cfg.json"
    linears = {f"transformer.layers.{layer}.mlp.fc": {"quant_algo": "W8A16"} for layer in range(4)}
    mixture.write_text(json.dumps({"quantized_layers": linears}))
    quantization = {"algorithm": "MIXED_PRECISION", "quant_cfg": str(mixture)}
    spec = tiny(make_spec, tiny_llama, "1", topology={"tp": 2}, quantization=quantization)
    job = client.submit(spec, place)
    assert not job.attached
    planned, *_, finished, published = events = list(job.events(timeout_seconds=240))
    assert isinstance(planned, Planned)
    assert isinstance(finished, StepsFinished)
    assert isinstance(published, Published)
    assert set(finished.ran) == set(planned.pending)
    assert any(isinstance(event, StepStarted) for event in events)
    assert job.result() == published
    _, manifest = read_release(published.manifest.removesuffix("/manifest.json"))
    assert manifest.build_key == planned.build_key

    again = client.submit(spec, place)
    assert (again.attached, again.id) == (True, job.id)
    assert again.result(timeout_seconds=60) == published
    assert job.id in [found.id for found in client.list()]
    nodes = {
        node["node_id"]: node["labels"] for node in json.loads(asked(bed, "/api/v0/nodes?detail=1"))["data"]["result"]["result"]
    }
    assert nodes[job.status().node]["role"] == "worker"
    _nothing_secret_travelled(bed, job)


def _nothing_secret_travelled(bed: RayNodes, job: RaySubmission) -> None:
    details = asked(bed, f"/api/jobs/{job.id}")
    uri = json.loads(details)["runtime_env"]["working_dir"]
    texts = _working_directory(bed, uri)
    assert {"spec.yaml", "cluster.yaml"} <= set(texts)
    texts |= {"details": details, "log": job.logs().encode()}
    for value in (*SECRETS.values(), bed.environment["RAY_AUTH_TOKEN"]):
        assert [name for name, text in texts.items() if value.encode() in text] == []


def _working_directory(bed: RayNodes, uri: str) -> dict[str, bytes]:
    """The files of a package as it lies on the nodes."""
    name = uri.rpartition("/")[2].removesuffix(".zip")
    folders = sorted(bed.folder.glob(f"ray*/session_2*/runtime_resources/working_dir_files/{name}"))
    assert folders, f"no node holds {name}"
    return {path.relative_to(folders[0]).as_posix(): path.read_bytes() for path in folders[0].rglob("*") if path.is_file()}


def test_build_stopped_in_its_middle_ends_cleanly_and_goes_on_when_submitted_again(
    client: Client, bed: RayNodes, place: ClusterSpec, make_spec: SpecMaker, sharded_llama: Path
) -> None:
    engine = {"max_batch_size": 2, "max_input_len": 8, "max_seq_len": 32}
    spec = tiny(make_spec, sharded_llama, "2", topology={"tp": 4, "pp": 2}, engine=engine)
    job = client.submit(spec, place)
    committed = _stop_while_it_compiles(job)
    assert job.status().state == "STOPPED"
    with pytest.raises(TerminatedError) as caught:
        job.result()
    assert caught.value.exit_code == 143
    assert json.loads(job.logs().rstrip().splitlines()[-1])["error"] == "TerminatedError"
    store = open_store(place.store)
    assert not list(store.list_uploads(commits.STEPS))
    assert not list(store.list(commits.LIVE))
    bed.wait(lambda: not {name for name in living_actors(bed) if name.endswith("Actor")}, "the end of the steps' actors", 60)

    again = client.submit(spec, place)
    assert (again.attached, again.id) == (False, f"{job.id}-2")
    planned, *_, finished, published = again.events(timeout_seconds=240)
    assert isinstance(planned, Planned)
    assert isinstance(finished, StepsFinished)
    assert isinstance(published, Published)
    assert committed
    assert not committed & set(finished.ran)
    assert len(planned.pending) < planned.steps


def _stop_while_it_compiles(job: RaySubmission) -> set[str]:
    """Stop the build when its first engine has begun; returns the steps that were committed until it ended."""
    committed: set[str] = set()
    stopped, event = False, None
    for event in job.events(timeout_seconds=240):
        if isinstance(event, StepSucceeded):
            committed.add(event.step)
        if isinstance(event, StepEvent) and event.kind == Kind.BUILD and committed and not stopped:
            stopped = True
            job.cancel()
    assert stopped
    assert isinstance(event, Errored)
    return committed


def test_driver_that_no_node_can_hold_is_told_and_withdrawn(
    client: Client, place: ClusterSpec, make_spec: SpecMaker, tiny_llama: Path
) -> None:
    spec = tiny(make_spec, tiny_llama, "4")
    waiting = client.submit(spec, place, driver=DriverSpec(resources={"licence": 1}), start_seconds=2)
    with pytest.raises(NotStartedError, match=r"none of [0-9] nodes has what the driver asks for: 1 licence"):
        waiting.result()
    assert waiting.status().state == "PENDING"
    assert waiting.cancel(wait_seconds=0).state == "PENDING"


def test_follow_on_the_command_line_ends_with_the_build_s_own_error(
    client: Client, bed: RayNodes, place: ClusterSpec, make_spec: SpecMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    for name, text in bundle(tiny(make_spec, tiny_llama, "5", topology={"tp": 3}), place).items():
        (tmp_path / name).write_text(text)
    words = [
        "submit",
        str(tmp_path / "spec.yaml"),
        "--cluster",
        str(tmp_path / "cluster.yaml"),
        "--address",
        client.address,
        "--follow",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == TopologyError.exit_code, result.output
    assert "tp in {1, 2, 4}" in " ".join(result.stderr.split())
