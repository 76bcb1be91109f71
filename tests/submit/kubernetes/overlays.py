"""The manifests of deploy/kuberay as kubectl renders them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from orchestrator.submit.kubernetes.manifests import load_manifests

KUBERAY = Path(__file__).resolve().parents[3] / "deploy" / "kuberay"
OVERLAYS = sorted(path.parent.name for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in KUBERAY.glob("components/*/kustomization.yaml"))
CORE_GROUPS = {"v1", "apps/v1", "batch/v1", "networking.k8s.io/v1", "policy/v1", "rbac.authorization.k8s.io/v1"}


@functools.cache
def _rendered(folder: Path) -> list[dict[str, Any]]:
    return load_manifests(folder)


def rendered(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization; the caller's own copy."""
    return copy.deepcopy(_rendered(folder))


def overlay(name: str) -> list[dict[str, Any]]:
    return rendered(KUBERAY / "overlays" / name)


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = [obj for obj in objects if obj["kind"] == kind]
    return found


def cluster_spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The RayCluster's spec, alone or within a RayJob."""
    kinds = {obj["kind"]: obj for obj in objects}
    spec: dict[str, Any] = kinds["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in kinds else kinds["RayCluster"]["spec"]
    return spec


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pods as the operator makes them of the templates, each once."""
    spec = cluster_spec(objects)
    groups = [("head", spec["headGroupSpec"]), *((group["groupName"], group) for group in spec["workerGroupSpecs"])]
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **group["template"]["metadata"]},
            "spec": group["template"]["spec"],
        }
        for name, group in groups
    ]
