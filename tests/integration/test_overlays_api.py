"""Every overlay, and the pods that the operator would make of it, taken by a real Kubernetes API server (a dry run of it).

Needs the binary (`make apiserver`) and etcd; skipped without.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.base.programs import find_program
from tests.submit.kubernetes.overlays import CORE_GROUPS, KUBERAY, OVERLAYS, overlay, pods, rendered
from tests.support.kube_apiserver import definition, for_1_20, run_apiserver, skip_reason

KUBECTL = find_program("kubectl") or "kubectl"

_REASON = skip_reason()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with run_apiserver(tmp_path_factory.mktemp("kube")) as server:
        path = server.kubeconfig("admin")
        for kind, plural in (("RayJob", "rayjobs"), ("RayCluster", "rayclusters")):
            done = kubectl(path, [definition(kind, plural)], "create", "--validate=false")
            assert done.returncode == 0, done.stderr
        done = kubectl(path, rendered(KUBERAY / "namespace"), "create")
        assert done.returncode == 0, done.stderr
        done = subprocess.run(
            [KUBECTL, f"--kubeconfig={path}", "wait", "--for=condition=Established", "crd", "--all"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        yield path


def kubectl(kubeconfig: Path, objects: list[dict[str, Any]], *words: str) -> subprocess.CompletedProcess[str]:
    command = [KUBECTL, f"--kubeconfig={kubeconfig}", *words, "-f", "-"]
    environment = {**os.environ, "HOME": str(kubeconfig.parent)}
    return subprocess.run(command, input=yaml.safe_dump_all(objects), capture_output=True, text=True, env=environment)


def for_old_server(pod: dict[str, Any]) -> dict[str, Any]:
    """Without what came after 1.20: volumes made with a pod."""
    for volume in pod["spec"]["volumes"]:
        if volume.pop("ephemeral", None):
            volume["emptyDir"] = {}
    pod["metadata"]["namespace"] = "trt-builds"
    return pod


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_is_taken_by_an_api_server(name: str, kubeconfig: Path) -> None:
    objects = overlay(name)
    known = [obj for obj in objects if obj["apiVersion"] in CORE_GROUPS or obj["apiVersion"] == "ray.io/v1"]
    made = [*for_1_20(known), *(for_old_server(pod) for pod in pods(objects))]
    done = kubectl(kubeconfig, made, "create", "--dry-run=server", "--validate=false")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(made)


def test_broken_overlay_is_refused_by_an_api_server(kubeconfig: Path) -> None:
    objects = overlay("cpu-aot")
    pod = for_old_server(pods(objects)[0])
    pod["spec"]["containers"][0]["volumeMounts"][0]["name"] = "none"
    done = kubectl(kubeconfig, [pod], "create", "--dry-run=server", "--validate=false")
    assert done.returncode != 0
    assert "volumeMounts[0].name" in done.stderr
