"""What KubeRay's operator asks of a RayCluster's groups, sizes and autoscaler, and its schema does not (v1.7)."""

from __future__ import annotations

from itertools import pairwise

from orchestrator.submit.kubernetes.manifests import Cluster, Group, environment
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule
from orchestrator.submit.kubernetes.rules.versions import below

_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"


@rule("RC01", Group, "Give the template a container: the first one runs Ray.")
def groups_have_containers(group: Group) -> Found:
    """Every group has a container."""
    if not group.containers:
        yield "template.spec.containers", "is empty"


@rule("RC02", Cluster, "Give both numbers, 0 or more, minReplicas not above maxReplicas and replicas between them.")
def replicas_are_ordered(cluster: Cluster) -> Found:
    """0 <= minReplicas <= replicas <= maxReplicas; without autoscaling both limits are given."""
    for number, group in enumerate(cluster.workers):
        path, least, most = f"workerGroupSpecs[{number}]", group.get("minReplicas"), group.get("maxReplicas")
        if not cluster.autoscales and (least is None or most is None):
            yield path, f"group {group.name} does not give both minReplicas and maxReplicas"
        for key in ("minReplicas", "maxReplicas"):
            if (group.get(key) or 0) < 0:
                yield f"{path}.{key}", f"{group.get(key)} is negative"
        given = [(key, group.get(key)) for key in ("minReplicas", "replicas", "maxReplicas") if group.get(key) is not None]
        for (low, first), (high, second) in pairwise(given):
            if first > second:
                yield path, f"{low} {first} is above {high} {second}"


@rule("RC03", Group, "Keep one of the two; without either, the operator takes the container's limits.")
def resources_are_given_once(group: Group) -> Found:
    """What Ray counts as a group's resources stands in rayStartParams or in resources, not in both."""
    params = group.get("rayStartParams") or {}
    given = [key for key in _RESOURCE_PARAMS if params.get(key)]
    if given and group.get("resources"):
        yield "resources", f"given beside rayStartParams {', '.join(given)}"


@rule("RC04", Cluster, "Set autoscalerOptions.version: v2 and enableInTreeAutoscaling: true, or leave the fields out.")
def idle_and_priority_need_new_autoscaler(cluster: Cluster) -> Found:
    """idleTimeoutSeconds and priority of a group belong to autoscaler v2; priority also to Ray 2.56 or later."""
    for number, group in enumerate(cluster.workers):
        path, idle, priority = f"workerGroupSpecs[{number}]", group.get("idleTimeoutSeconds"), group.get("priority")
        if idle is not None and (idle < 0 or not _scales_by_v2(cluster)):
            yield f"{path}.idleTimeoutSeconds", f"{idle}, " + ("negative" if idle < 0 else "without autoscaler v2")
        if priority and below(cluster.get("rayVersion"), "2.56.0"):
            yield f"{path}.priority", f"{priority} with rayVersion {cluster.get('rayVersion')}"
        elif priority and not _scales_by_v2(cluster):
            yield f"{path}.priority", f"{priority} without autoscaler v2"


@rule("RC05", Cluster, "Leave suspend out, or turn enableInTreeAutoscaling off.")
def suspended_groups_are_not_scaled(cluster: Cluster) -> Found:
    """No worker group is suspended while the autoscaler decides."""
    for number, group in enumerate(cluster.workers):
        if cluster.autoscales and group.get("suspend"):
            yield f"workerGroupSpecs[{number}].suspend", "true with enableInTreeAutoscaling"


@rule("RC06", Cluster, "Leave the variable out: autoscalerOptions.version chooses the autoscaler.")
def autoscaler_is_chosen_by_field(cluster: Cluster) -> Found:
    """RAY_enable_autoscaler_v2 is not switched on without autoscaling, and not given beside autoscalerOptions.version."""
    if _AUTOSCALER_V2 not in environment(cluster.head.ray):
        return
    path, value = "headGroupSpec.template.spec.containers[0].env", environment(cluster.head.ray)[_AUTOSCALER_V2].get("value")
    if not cluster.autoscales and value in {"1", "true"}:
        yield path, f"{_AUTOSCALER_V2} is {value} without enableInTreeAutoscaling"
    if cluster.autoscales and cluster.get("autoscalerOptions.version") is not None:
        yield path, f"{_AUTOSCALER_V2} beside autoscalerOptions.version"


@rule("RC07", Cluster, "Leave restartPolicy out, or set Never: autoscaler v2 replaces pods, it does not restart them.")
def scaled_pods_are_not_restarted(cluster: Cluster) -> Found:
    """With autoscaler v2 no pod's restartPolicy is other than Never."""
    if not (cluster.autoscales and cluster.get("autoscalerOptions.version") == "v2"):
        return
    for group in [cluster.head, *cluster.workers]:
        policy = group.get("template.spec.restartPolicy")
        if policy not in {None, "", "Never"}:
            yield f"{_within(cluster, group)}.template.spec.restartPolicy", f"{policy} with autoscaler v2"


@rule("RC08", Cluster, "Give 0 or more seconds, and leave KUBERAY_GEN_AUTOSCALER_START_CMD to the operator.")
def autoscaler_options_are_sound(cluster: Cluster) -> Found:
    """autoscalerOptions has no negative idle time and none of the operator's own variables."""
    seconds = cluster.get("autoscalerOptions.idleTimeoutSeconds")
    if seconds is not None and seconds < 0:
        yield "autoscalerOptions.idleTimeoutSeconds", f"{seconds} is negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in environment(cluster.get("autoscalerOptions") or {}):
        yield "autoscalerOptions.env", "sets KUBERAY_GEN_AUTOSCALER_START_CMD"


def _scales_by_v2(cluster: Cluster) -> bool:
    value = environment(cluster.head.ray).get(_AUTOSCALER_V2, {}).get("value")
    return cluster.get("autoscalerOptions.version") == "v2" or value in {"1", "true"}


def _within(cluster: Cluster, group: Group) -> str:
    return group.path.removeprefix(f"{cluster.path}.")


RULES: tuple[AnyRule, ...] = (
    groups_have_containers, replicas_are_ordered, resources_are_given_once, idle_and_priority_need_new_autoscaler,
    suspended_groups_are_not_scaled, autoscaler_is_chosen_by_field, scaled_pods_are_not_restarted, autoscaler_options_are_sound,
)  # fmt: skip
