"""Every overlay, as kubectl renders it, against all that can be asked of it without a cluster."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes.utils import parse_quantity as quantity

from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.submit.bundle import ENTRYPOINT
from orchestrator.submit.kubernetes.manifests import load_manifests
from orchestrator.submit.kubernetes.rules import problems
from tests.submit.kubernetes.overlays import (
    COMPONENTS,
    CORE_GROUPS,
    KUBERAY,
    OVERLAYS,
    cluster_spec,
    of_kind,
    overlay,
    pods,
    rendered,
)
from tests.support.kuberay import KINDS, cel_errors, schema_errors

KUBERNETES_VERSIONS = ("1.29", "1.37")
ISSUE = {"cpu-aot", "h100", "l40s-mixed", "kueue", "volcano", "gcs-fault-tolerance", "monitoring", "interactive"}
by_overlay = pytest.mark.parametrize("name", OVERLAYS)


def test_overlays_all_that_were_promised_are_there() -> None:
    assert set(OVERLAYS) == ISSUE


@by_overlay
def test_overlay_keeps_every_rule(name: str) -> None:
    assert [str(problem) for problem in problems(overlay(name))] == []


@by_overlay
def test_overlay_passes_the_api_schemas_and_their_cel_rules(name: str) -> None:
    found = [obj for obj in overlay(name) if obj["kind"] in KINDS]
    assert found
    assert [error for obj in found for error in schema_errors(obj)] == []
    assert [error for obj in found for error in cel_errors(obj)] == []


@by_overlay
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_overlay_core_objects_and_pods_are_strictly_valid(name: str, version: str) -> None:
    objects = overlay(name)
    core = [obj for obj in objects if obj["apiVersion"] in CORE_GROUPS]
    assert {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"} <= {obj["kind"] for obj in core}
    for obj in [*core, *pods(objects)]:
        kubernetes_validate.validate(obj, version, strict=True)


@by_overlay
def test_overlay_pods_and_all_their_containers_are_of_the_restricted_profile(name: str) -> None:
    """All that pod security asks and PS01 does not: what nobody should add to these pods."""
    for pod in pods(overlay(name)):
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        known = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile"}
        assert set(spec["securityContext"]) <= known
        assert spec["securityContext"].get("runAsUser") != 0
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            own = {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem", "runAsNonRoot"}
            assert set(container["securityContext"]) <= own
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not [port for port in container.get("ports", []) if "hostPort" in port]
            assert not {"livenessProbe", "readinessProbe", "startupProbe", "lifecycle"} & container.keys()


def test_schemas_broken_objects_are_refused() -> None:
    objects = overlay("cpu-aot")
    job, policy = of_kind(objects, "RayJob"), next(obj for obj in objects if obj["kind"] == "NetworkPolicy")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    job["spec"]["backoffLimit"] = "two"
    job["spec"]["deletionStrategy"] = {"deletionRules": [{"policy": "DeleteCluster", "condition": {"ttlSeconds": 1}}]}
    job["spec"]["managedBy"] = "me"
    errors = schema_errors(job)
    assert len(errors) == 2
    assert any("imagePullPolice" in error for error in errors)
    assert any("$.spec.backoffLimit" in error for error in errors)
    assert len(cel_errors(job)) == 2
    policy["spec"]["policyTypos"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="policyTypos"):
        kubernetes_validate.validate(policy, KUBERNETES_VERSIONS[-1], strict=True)


@by_overlay
def test_overlay_every_object_is_in_one_namespace_and_none_is_a_secret(name: str) -> None:
    objects = overlay(name)
    assert {obj["metadata"]["namespace"] for obj in objects} == {"trt-builds"}
    assert "Secret" not in {obj["kind"] for obj in objects}


@pytest.mark.parametrize("name", sorted(ISSUE - {"interactive"}))
def test_overlay_runs_the_command_of_submit_in_the_folder_of_its_bundle(name: str) -> None:
    objects = overlay(name)
    job = of_kind(objects, "RayJob")
    bundle = next(obj for obj in objects if obj["kind"] == "ConfigMap" and obj["metadata"]["name"] == "build")
    assert job["spec"]["entrypoint"] == ENTRYPOINT
    decode(BuildSpec, yaml.safe_load(bundle["data"]["spec.yaml"]), "spec.yaml")
    decode(ClusterSpec, yaml.safe_load(bundle["data"]["cluster.yaml"]), "cluster.yaml")
    for pod in pods(objects):
        (volume,) = [item["name"] for item in pod["spec"]["volumes"] if item.get("configMap", {}).get("name") == "build"]
        ray = pod["spec"]["containers"][0]
        (mount,) = [item["mountPath"] for item in ray["volumeMounts"] if item["name"] == volume]
        assert ray["workingDir"] == mount


@by_overlay
def test_overlay_network_policy_names_every_port_that_ray_is_told_to_use(name: str) -> None:
    objects = overlay(name)
    policy = next(obj for obj in objects if obj["kind"] == "NetworkPolicy" and obj["metadata"]["name"] == "ray")
    (ingress,) = policy["spec"]["ingress"]
    allowed = {port for item in ingress["ports"] for port in range(item["port"], item.get("endPort", item["port"]) + 1)}
    spec = cluster_spec(objects)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        params = group["rayStartParams"]
        told = {int(value) for key, value in params.items() if key.endswith("-port") and "worker-port" not in key}
        workers = set(range(int(params["min-worker-port"]), int(params["max-worker-port"]) + 1))
        assert len(told) == 6
        assert told | workers | {6379, 8265} <= allowed


def test_network_policies_deny_all_that_the_others_do_not_name() -> None:
    policies = {obj["metadata"]["name"]: obj["spec"] for obj in overlay("cpu-aot") if obj["kind"] == "NetworkPolicy"}
    assert set(policies["deny-all"]) == {"podSelector", "policyTypes"}
    assert policies["deny-all"]["policyTypes"] == ["Ingress", "Egress"]
    labels = policies["deny-all"]["podSelector"]["matchLabels"].items()
    assert all(labels <= pod["metadata"]["labels"].items() for pod in pods(overlay("cpu-aot")))


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_on_the_base_keeps_every_rule(component: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": [_relative(folder, "base")], "components": [_relative(folder, f"components/{component}")]})
    )
    objects = load_manifests(folder)
    assert [str(problem) for problem in problems(objects)] == []
    for obj in objects:
        if obj["apiVersion"] in CORE_GROUPS:
            kubernetes_validate.validate(obj, KUBERNETES_VERSIONS[-1], strict=True)
        elif obj["kind"] in KINDS:
            assert schema_errors(obj) + cel_errors(obj) == []


def test_base_renamed_by_a_suffix_keeps_its_references(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [_relative(folder, "base")], "nameSuffix": "-two"}))
    objects = load_manifests(folder)
    assert of_kind(objects, "ConfigMap")["metadata"]["name"] == "build-two"
    for pod in pods(objects):
        assert pod["spec"]["serviceAccountName"] == "trt-orchestrator-two"
        assert "build-two" in [item["configMap"]["name"] for item in pod["spec"]["volumes"] if "configMap" in item]
    assert problems(objects) == []


def _relative(folder: Path, name: str) -> str:
    """kustomize takes no absolute paths."""
    return os.path.relpath(KUBERAY / name, folder.resolve())


def test_interactive_cluster_is_that_of_a_build() -> None:
    assert cluster_spec(overlay("interactive")) == cluster_spec(overlay("cpu-aot"))
    assert "RayJob" not in {obj["kind"] for obj in overlay("interactive")}


def test_namespace_admits_restricted_pods_only() -> None:
    objects = rendered(KUBERAY / "namespace")
    for obj in objects:
        kubernetes_validate.validate(obj, KUBERNETES_VERSIONS[-1], strict=True)
    namespace = of_kind(objects, "Namespace")
    assert namespace["metadata"]["name"] == "trt-builds"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


class TestKueue:
    """Quotas are numbers that must fit the pods, or the build waits for ever."""

    queues = KUBERAY / "overlays" / "kueue" / "queues"

    def flavors(self) -> dict[str, dict[str, Decimal]]:
        queue = of_kind(rendered(self.queues), "ClusterQueue")
        (group,) = queue["spec"]["resourceGroups"]
        assert all([item["name"] for item in flavor["resources"]] == group["coveredResources"] for flavor in group["flavors"])
        return {
            flavor["name"]: {item["name"]: quantity(item["nominalQuota"]) for item in flavor["resources"]}
            for flavor in group["flavors"]
        }

    def test_job_waits_in_a_queue_that_leads_to_the_cluster_queue(self) -> None:
        objects, queues = overlay("kueue"), rendered(self.queues)
        local = of_kind(objects, "LocalQueue")
        assert of_kind(objects, "RayJob")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
        queue = of_kind(queues, "ClusterQueue")
        assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
        assert {obj["apiVersion"] for obj in [local, *queues]} == {"kueue.x-k8s.io/v1beta2"}
        flavors = {obj["metadata"]["name"] for obj in queues if obj["kind"] == "ResourceFlavor"}
        assert set(self.flavors()) == flavors

    @pytest.mark.parametrize("name", ["cpu-aot", "h100", "l40s-mixed"])
    def test_pods_of_a_build_fit_the_quotas(self, name: str) -> None:
        left = self.flavors()
        kinds = {obj["metadata"]["name"]: obj for obj in rendered(self.queues) if obj["kind"] == "ResourceFlavor"}
        for pod, count in counted(overlay(name)):
            wanted = pod["spec"]["containers"][0]["resources"]["requests"]
            flavor = next(flavor for flavor in left if admits(kinds[flavor], pod["spec"]) and fits(wanted, count, left[flavor]))
            assert set(wanted) <= set(left[flavor])
            for resource, amount in wanted.items():
                left[flavor][resource] -= quantity(amount) * count
        assert all(amount >= 0 for flavor in left.values() for amount in flavor.values())


def counted(objects: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    return list(zip(pods(objects), [1, *(group["replicas"] for group in cluster_spec(objects)["workerGroupSpecs"])], strict=True))


def admits(flavor: dict[str, Any], pod: dict[str, Any]) -> bool:
    """Whether a pod may run on a flavor's machines: its selector agrees with their labels, it tolerates their taints."""
    spec = flavor.get("spec") or {}
    labels, tolerated = spec.get("nodeLabels", {}), {item["key"] for item in pod.get("tolerations", [])}
    selector = {key: value for key, value in pod.get("nodeSelector", {}).items() if key == "nvidia.com/gpu.product"}
    return selector == labels and {taint["key"] for taint in spec.get("nodeTaints", [])} <= tolerated


def fits(wanted: dict[str, str], count: int, quota: dict[str, Decimal]) -> bool:
    return all(quantity(amount) * count <= quota.get(name, 0) for name, amount in wanted.items())


def test_volcano_queue_holds_the_build() -> None:
    objects = overlay("volcano")
    labels = of_kind(objects, "RayJob")["metadata"]["labels"]
    (queue,) = rendered(KUBERAY / "overlays" / "volcano" / "queue")
    assert labels["ray.io/scheduler-name"] == "volcano"
    assert labels["volcano.sh/queue-name"] == queue["metadata"]["name"]
    for resource, capability in queue["spec"]["capability"].items():
        requested = [(pod["spec"]["containers"][0]["resources"]["requests"], count) for pod, count in counted(objects)]
        assert sum(quantity(item.get(resource, "0")) * count for item, count in requested) <= quantity(capability)


def test_gcs_fault_tolerance_is_kept_on_a_volume_and_not_in_redis() -> None:
    options = cluster_spec(overlay("gcs-fault-tolerance"))["gcsFaultToleranceOptions"]
    assert options == {"backend": "rocksdb", "storage": {"size": "1Gi"}}


def test_monitoring_reads_a_port_that_every_pod_has_and_prometheus_may_reach() -> None:
    objects = overlay("monitoring")
    monitor = of_kind(objects, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for pod in pods(objects):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        numbers = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        policy = next(obj for obj in objects if obj["kind"] == "NetworkPolicy" and obj["metadata"]["name"] == "prometheus")
        assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": numbers[endpoint["port"]]}]


def test_driver_group_has_the_cpu_that_the_entry_point_takes_and_no_more() -> None:
    job = of_kind(overlay("h100"), "RayJob")
    driver = next(group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "driver")
    assert json.loads(job["spec"]["entrypointResources"]) == {"driver": 1}
    assert (driver["resources"]["CPU"], job["spec"]["entrypointNumCpus"]) == ("1", 1)
