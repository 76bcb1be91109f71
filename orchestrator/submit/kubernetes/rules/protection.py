"""Authentication, encryption, network policies and the history server of a RayCluster, as KubeRay's operator takes them (v1.7)."""

from __future__ import annotations

import re

from orchestrator.submit.kubernetes.manifests import Cluster, environment
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule
from orchestrator.submit.kubernetes.rules.versions import below

GATES = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
"""Fields that the operator refuses unless it was started with a feature gate that is off by default."""
NEEDED_GATES = "trt-orchestrator/operator-feature-gates"
"""Annotation: the feature gates that a manifest needs, separated by commas."""
_TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_COLLECTOR_ENV = frozenset(
    {"POD_IP", "FQ_RAY_IP", "RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE", "RAY_ROLE", "OWNER_KIND", "OWNER_NAME", "EVENTS_PORT"}
)
_DNS_1123_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@rule("RA01", Cluster, "Set rayVersion to the version in the image, 2.52.0 or later.")
def tokens_need_new_ray(cluster: Cluster) -> Found:
    """authOptions.mode token needs a rayVersion of at least 2.52.0."""
    if cluster.get("authOptions.mode") == "token" and below(cluster.get("rayVersion"), "2.52.0"):
        yield "rayVersion", f"{cluster.get('rayVersion')} with authOptions.mode token"


@rule("RA02", Cluster, "Set mode: token and a rayVersion of 2.55.0 or later, and leave secretName out.")
def kubernetes_tokens_are_tokens(cluster: Cluster) -> Found:
    """enableK8sTokenAuth needs mode token and Ray 2.55.0, and excludes secretName."""
    if not cluster.get("authOptions.enableK8sTokenAuth"):
        return
    if cluster.get("authOptions.mode") != "token":
        yield "authOptions.mode", "is not token, but enableK8sTokenAuth is true"
    if below(cluster.get("rayVersion"), "2.55.0"):
        yield "rayVersion", f"{cluster.get('rayVersion')} with enableK8sTokenAuth"
    if cluster.get("authOptions.secretName"):
        yield "authOptions.secretName", "given beside enableK8sTokenAuth"


@rule(
    "RA03",
    Cluster,
    f"Start the operator with --feature-gates=NAME=true, and name it in the annotation {NEEDED_GATES}; or leave the field out.",
)
def gated_fields_are_announced(cluster: Cluster) -> Found:
    """A field behind a feature gate of the operator is announced by the manifest, as the operator refuses it by default."""
    announced = {gate.strip() for gate in str(cluster.annotations.get(NEEDED_GATES, "")).split(",")}
    needed = {field: gate for field, gate in GATES.items() if cluster.get(field) is not None}
    if cluster.get("gcsFaultToleranceOptions.backend") == "rocksdb":
        needed["gcsFaultToleranceOptions.backend"] = "GCSFaultToleranceEmbeddedStorage"
    for field, gate in needed.items():
        if gate not in announced:
            yield field, f"needs the operator's feature gate {gate}"


@rule("RA04", Cluster, "Leave out the rules of the direction that the mode leaves open; name groups that exist, in lower case.")
def network_rules_fit_their_mode(cluster: Cluster) -> Found:
    """networkPolicy has rules only for what its mode denies, and names worker groups that exist and whose names are DNS labels."""
    policy = cluster.get("networkPolicy")
    if policy is None:
        return
    unused = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.get(policy.get("mode") or "DenyAll")
    parts = [(key, policy.get(key) or {}) for key in ("head", "worker")]
    parts += [(f"workerGroups[{number}]", group) for number, group in enumerate(policy.get("workerGroups") or [])]
    names = {group.name for group in cluster.workers}
    for path, part in parts:
        if unused and part.get(unused):
            yield f"networkPolicy.{path}.{unused}", f"given with mode {policy.get('mode')}"
        if path.startswith("workerGroups") and part.get("groupName") not in names:
            yield f"networkPolicy.{path}.groupName", f"{part.get('groupName')} is no worker group"
    for name in sorted(names):
        if not _DNS_1123_LABEL.fullmatch(name):
            yield "workerGroupSpecs", f"{name!r} is no DNS-1123 label, which networkPolicy makes names of"


@rule("RA05", Cluster, "Leave them out: the operator brings certificates and variables.")
def certificates_are_the_operators(cluster: Cluster) -> Found:
    """With tlsOptions no container sets the variables of TLS."""
    if cluster.get("tlsOptions") is None or cluster.get("tlsOptions.enabled") is False:
        return
    places = [
        (f"{_tail(cluster, group.path)}.template.spec.containers[0]", group.ray) for group in [cluster.head, *cluster.workers]
    ]
    for path, container in [*places, ("autoscalerOptions", cluster.get("autoscalerOptions") or {})]:
        for name in _TLS_ENV:
            if name in environment(container):
                yield f"{path}.env", f"sets {name}"


@rule("RA06", Cluster, "Give collectorOptions with its image and STORAGE_BACKEND, and leave the operator's variables out.")
def collector_is_configured(cluster: Cluster) -> Found:
    """historyServerOptions has a collector with image and storage backend, without the operator's own variables."""
    if cluster.get("historyServerOptions") is None:
        return
    collector, path = cluster.get("historyServerOptions.collectorOptions"), "historyServerOptions.collectorOptions"
    if collector is None:
        yield path, "is not given"
        return
    if not collector.get("image"):
        yield f"{path}.image", "is not given"
    given = environment(collector)
    if not given.get("STORAGE_BACKEND", {}).get("value"):
        yield f"{path}.env", "does not set STORAGE_BACKEND"
    for name in sorted(_COLLECTOR_ENV & given.keys()):
        yield f"{path}.env", f"sets {name}"


def _tail(cluster: Cluster, path: str) -> str:
    return path.removeprefix(f"{cluster.path}.")


RULES: tuple[AnyRule, ...] = (
    tokens_need_new_ray,
    kubernetes_tokens_are_tokens,
    gated_fields_are_announced,
    network_rules_fit_their_mode,
    certificates_are_the_operators,
    collector_is_configured,
)
