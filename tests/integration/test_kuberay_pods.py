"""The pods of deploy/kuberay without Kubernetes: real Ray nodes started as the operator starts them, the job submitted its way."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.cluster import ClusterSpec
from orchestrator.submit.bundle import CLUSTER_FILE, bundle
from orchestrator.submit.kubernetes.overlays import load_overlay
from tests.conftest import SpecMaker
from tests.submit.kubernetes.overlays import cluster_spec, of_kind
from tests.support.ray_nodes import HEAD, BedOptions, RayNodes, skip_reason

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason())),
]
OVERLAY = load_overlay("cpu-aot")
DRIVER, BUILDER = 2, 3


class Pods(RayNodes):
    """Head, driver and one builder, with the start parameters, labels and resources of the overlay."""

    def _ray_options(self, node: int) -> list[str]:
        spec = cluster_spec(OVERLAY)
        group = spec["headGroupSpec"] if node == HEAD else spec["workerGroupSpecs"][node - 2]
        params = {key: value.replace("/scratch", str(self.scratch)) for key, value in group["rayStartParams"].items()}
        params |= {"head": None, "dashboard-host": "0.0.0.0"} if node == HEAD else {"address": self.address}
        resources = {name: float(amount) for name, amount in group.get("resources", {}).items()}
        cpus = resources.pop("CPU", 2)  # the builders' own number would start too many processes on this machine
        params.setdefault("num-cpus", f"{cpus:g}")
        if resources:
            params["resources"] = json.dumps(resources)
        if group.get("labels"):
            params["labels"] = ",".join(f"{key}={value}" for key, value in group["labels"].items())
        return [f"--{key}" if value is None else f"--{key}={value}" for key, value in params.items()]

    def asked(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The dashboard's answer, to the operator's kind of request."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self.dashboard + path, data, headers), timeout=30.0) as answer:
            return json.load(answer)


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    # That of the pods: the operator's shell starts Ray in the container's working directory.
    monkeypatch.chdir(tmp_path)
    bed = Pods(BedOptions(num_nodes=3))
    try:
        bed.up()
        yield bed
    finally:
        bed.down()


def test_job_of_the_overlay_on_its_pods_builds_and_the_driver_is_where_it_should_be(
    pods: Pods, make_spec: SpecMaker, tiny_llama: Path, tmp_path: Path
) -> None:
    job = of_kind(OVERLAY, "RayJob")["spec"]
    place = ClusterSpec.model_validate(
        {
            "kind": "ray",
            "address": "auto",
            "store": pods.store_url,
            "scratch": str(pods.scratch),
            "pools": {"cpu": {"labels": {"pool": "cpu"}}},
        }
    )
    assert "pools:\n  cpu:\n    labels: {pool: cpu}" in of_kind(OVERLAY, "ConfigMap")["data"][CLUSTER_FILE]
    spec = make_spec(tiny_llama, verification={"enabled": False}, release={"name": "pods", "version": "1"})
    for name, text in bundle(spec, place).items():
        (tmp_path / name).write_text(text)
    pods.asked(
        "/api/jobs/",
        {
            "entrypoint": job["entrypoint"],
            "submission_id": "build-pods",
            "entrypoint_num_cpus": job["entrypointNumCpus"],
            "entrypoint_resources": json.loads(job["entrypointResources"]),
        },
    )
    pods.wait(lambda: pods.asked("/api/jobs/build-pods")["status"] in {"SUCCEEDED", "FAILED", "STOPPED"}, "the build")
    found, log = pods.asked("/api/jobs/build-pods"), pods.asked("/api/jobs/build-pods/logs")["logs"]
    assert found["status"] == "SUCCEEDED", log
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    last = events[-1]
    assert (last["event"], last["manifest"]) == ("published", f"{pods.store_url}/releases/pods/1/manifest.json")
    assert found["driver_info"]["node_ip_address"] == pods.ip(DRIVER)
    assert {event["node"].partition("/")[0] for event in events if event["event"] == "started"} == {f"node{BUILDER}"}, events
