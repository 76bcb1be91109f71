"""Needs of this program for a RayJob and its cluster, so that a build ends, and ends well.

Kubernetes, KubeRay and Kueue check their own fields (`kubectl apply --dry-run=server`; the operator within seconds). RN01, RC02 and
PS01 are here because nobody refuses those mistakes before a build waits for pods, or has fewer pods than requested.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise

from orchestrator.submit.bundle import ENTRYPOINT
from orchestrator.submit.kubernetes.manifests import Cluster, Group, Job, Object, Pod, at, environment
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule

_DRAIN, _DEFAULT_DRAIN_SECONDS, _DEFAULT_GRACE_SECONDS = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30, 30
_SECRET_NAME = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|API_KEY|PRIVATE_KEY|CREDENTIALS)(_ID)?$", re.IGNORECASE)
_PIN = re.compile(r"(@sha256:[0-9a-f]{64}|:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})$")
_GPU = "nvidia.com/gpu"
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MAX_NAME_LENGTH = {"RayCluster": 53, "RayJob": 47}
"""Reserve for suffixes: the operator adds one to a job's name for its cluster, and another for the cluster's Service."""
_VOLUMES = frozenset({"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"})


@rule("RN01", Object, "Use lower-case letters, digits and '-', beginning with a letter; at most 47 characters, a RayCluster 53.")
def names_are_short_labels(obj: Object) -> Found:
    """The name of a Ray resource is a DNS-1035 label, short enough for the names that the operator makes of it."""
    limit, name = MAX_NAME_LENGTH.get(obj.kind), str(obj.get("metadata.name", ""))
    if limit is None or not str(obj.get("apiVersion", "")).startswith("ray.io/"):
        return
    if len(name) > limit:
        yield "metadata.name", f"{name!r} has {len(name)} characters, more than {limit}"
    if not _DNS_1035.fullmatch(name):
        yield "metadata.name", f"{name!r} is no DNS-1035 label"


@rule("RC02", Cluster, "Give minReplicas, replicas and maxReplicas together, in this order of size.")
def replicas_are_ordered(cluster: Cluster) -> Found:
    """minReplicas <= replicas <= maxReplicas: the operator cuts the number of pods silently to these limits."""
    for number, group in enumerate(cluster.workers):
        given = [(key, group.get(key)) for key in ("minReplicas", "replicas", "maxReplicas") if group.get(key) is not None]
        for (low, first), (high, second) in pairwise(given):
            if first > second:
                yield f"workerGroupSpecs[{number}]", f"{low} {first} is above {high} {second}"


@rule(
    "PS01",
    Pod,
    "Set securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, runAsNonRoot: true, seccompProfile: "
    "{type: RuntimeDefault}} in each container (the last two for the pod, if you like), and mount claims, not folders of the host.",
)
def pods_are_restricted(pod: Pod) -> Found:
    """Containers and volumes are what the namespace admits (profile `restricted`): no dry run of a RayJob looks at its pods."""
    for path, container in pod.containers:
        own = at(container, "securityContext", {})
        both = {**pod.get("securityContext", {}), **own}
        met = {
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "seccompProfile.type": at(both, "seccompProfile.type") in {"RuntimeDefault", "Localhost"},
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities.drop": "ALL" in at(own, "capabilities.drop", []),
        }
        for key in (key for key, is_met in met.items() if not is_met):
            yield f"{path}.securityContext.{key}", f"is {at(both, key, 'not set')}"
    for number, volume in enumerate(pod.get("volumes", [])):
        for kind in sorted(volume.keys() - _VOLUMES - {"name"}):
            yield f"volumes[{number}]", f"{volume.get('name')} is of kind {kind}"


@rule("TB01", Job, f"Use `{ENTRYPOINT}`, with the bundle's ConfigMap at the containers' workingDir.")
def entry_point_is_ours(job: Job) -> Found:
    """The entry point is the command that `orchestrator submit` runs."""
    if job.get("entrypoint") != ENTRYPOINT:
        yield "entrypoint", f"is {job.get('entrypoint')!r}"


@rule("TB02", Job, "Set submissionMode: HTTPMode.")
def job_outlives_its_logs(job: Job) -> Found:
    """The job is submitted over HTTP: the modes that follow its log end a healthy build when the stream breaks."""
    mode = job.get("submissionMode", "K8sJobMode")
    if mode != "HTTPMode":
        yield "submissionMode", f"is {mode}"


@rule("TB03", Job, "Give both in seconds: how long pods may take to come, and how long the whole build may take.")
def build_has_deadlines(job: Job) -> Found:
    """A build that never starts or hangs ends at a deadline."""
    for key in ("preRunningDeadlineSeconds", "activeDeadlineSeconds"):
        if job.get(key) is None:
            yield key, "is not given"


@rule(
    "TB04",
    Job,
    'Give a small worker group `resources: {CPU: "1", driver: "1"}`, and ask for it: entrypointResources: \'{"driver": 1}\'.',
)
def driver_is_off_the_head(job: Job) -> Found:
    """The driver asks for a resource that a worker group has and the head has not: it would die with the head."""
    if job.get("rayClusterSpec") is None:
        return
    text = job.get("entrypointResources") or "{}"
    try:
        asked = set(json.loads(text))
    except (ValueError, TypeError):
        yield "entrypointResources", f"{text!r} is no mapping in JSON"
        return
    groups = job.get("rayClusterSpec.workerGroupSpecs", []) or []
    offered = {name for group in groups for name in group.get("resources") or {}}
    if not asked:
        yield "entrypointResources", "is not given"
    elif not asked <= offered:
        yield "entrypointResources", f"no worker group has {', '.join(sorted(asked - offered))}"


@rule("TB05", Cluster, 'Set headGroupSpec.rayStartParams.num-cpus: "0".')
def head_takes_no_work(cluster: Cluster) -> Found:
    """No step runs on the head."""
    group = cluster.get("headGroupSpec", {}) or {}
    if (at(group, "rayStartParams.num-cpus") or at(group, "resources.CPU")) != "0":
        yield "headGroupSpec.rayStartParams.num-cpus", 'is not "0"'


@rule("TB06", Cluster, "Set authOptions: {mode: token}.")
def cluster_asks_for_a_token(cluster: Cluster) -> Found:
    """Ray's ports require a token, because anyone who reaches them can run code."""
    if cluster.get("authOptions.mode") != "token":
        yield "authOptions.mode", f"is {cluster.get('authOptions.mode') or 'not given'}"


@rule("TB07", Group, "Give both, with the same values: a build's memory is planned, and Ray takes the limits for what there is.")
def requests_are_limits(group: Group) -> Found:
    """Ray's container requests exactly its limits: CPUs, memory, GPUs and all else."""
    requests, limits = at(group.ray, "resources.requests") or {}, at(group.ray, "resources.limits") or {}
    for name in sorted({"cpu", "memory"} | requests.keys() | limits.keys()):
        if requests.get(name) is None or requests.get(name) != limits.get(name):
            yield "template.spec.containers[0].resources", f"{name}: request {requests.get(name)}, limit {limits.get(name)}"


@rule("TB08", Group, f"Set terminationGracePeriodSeconds above {_DRAIN}: upload and clean-up come after the drain.")
def pods_have_time_to_drain(group: Group) -> Found:
    """A pod that has to go is not killed before Ray has drained it."""
    drain = environment(group.ray).get(_DRAIN, {}).get("value", _DEFAULT_DRAIN_SECONDS)
    grace = group.get("template.spec.terminationGracePeriodSeconds", _DEFAULT_GRACE_SECONDS)
    if not str(drain).isdecimal():
        yield "template.spec.containers[0].env", f"{_DRAIN} is {drain!r}, not a number of seconds"
    elif grace <= int(drain):
        yield "template.spec.terminationGracePeriodSeconds", f"{grace} is not above the drain's {drain}"


@rule("TB09", Pod, "Name a version, or better a digest: NAME@sha256:...")
def images_are_pinned(pod: Pod) -> Found:
    """Every image is pinned, so that all pods and a retry run the same program."""
    for path, container in pod.containers:
        image = str(container.get("image", ""))
        if not _PIN.search(image) or image.endswith(":latest"):
            yield f"{path}.image", f"{image!r} is not pinned"


@rule("TB10", Pod, "Use the ServiceAccount's role, or a Secret through envFrom; keep secrets out of manifests.")
def manifests_hold_no_secret(pod: Pod) -> Found:
    """No variable that by its name is secret has its value in the manifest."""
    for path, container in pod.containers:
        for name, entry in environment(container).items():
            if entry.get("value") and _SECRET_NAME.search(name):
                yield f"{path}.env", f"{name} has its value here"


@rule("TB11", Object, "Make the Secret apart, from a vault or by `kubectl create secret`, and only name it here.")
def secrets_are_made_elsewhere(obj: Object) -> Found:
    """No Secret with contents is among the manifests, and a RayJob's runtime environment, which the dashboard shows, holds none."""
    if obj.kind == "Secret" and (obj.get("data") or obj.get("stringData")):
        yield "data", "is given"
    text = str(obj.get("spec.runtimeEnvYAML", "")) if obj.kind == "RayJob" else ""
    for name in re.findall(r"(\w+)\"?\s*:\s*[^\s{]", text):
        if _SECRET_NAME.search(name):
            yield "spec.runtimeEnvYAML", f"sets {name}"


@rule("TB12", Group, "Give the group labels: {ray.io/accelerator-type: H100}, and name the same in the cluster file's pool.")
def gpus_have_a_type(group: Group) -> Found:
    """A group with GPUs names their type: an engine is for one type of GPU, and steps are placed by this label."""
    if at(group.ray, "resources.limits", {}).get(_GPU) and not (group.get("labels") or {}).get("ray.io/accelerator-type"):
        yield "labels", "has no ray.io/accelerator-type"


@rule("TB13", Group, "Set securityContext.readOnlyRootFilesystem: true, and mount volumes at /tmp, /dev/shm and the home folder.")
def root_is_read_only(group: Group) -> Found:
    """Ray's container cannot change its own program, and writes to volumes only."""
    if at(group.ray, "securityContext.readOnlyRootFilesystem") is not True:
        yield "template.spec.containers[0].securityContext.readOnlyRootFilesystem", "is not true"
    mounted = {mount.get("mountPath") for mount in group.ray.get("volumeMounts") or [] if not mount.get("readOnly")}
    for path in sorted({"/tmp", "/dev/shm", environment(group.ray).get("HOME", {}).get("value")} - mounted, key=str):  # noqa: S108
        yield (
            "template.spec.containers[0].volumeMounts",
            f"nothing that can be written is mounted at {path or 'HOME, which is not set'}",
        )


@rule("TB14", Object, "Give minAvailable as a number: Kubernetes cannot compute the others of pods that a RayCluster owns.")
def budgets_are_counts(obj: Object) -> Found:
    """A PodDisruptionBudget of Ray's pods is a count of available ones."""
    labels = obj.get("spec.selector.matchLabels") or {}
    if obj.kind != "PodDisruptionBudget" or not any(key.startswith(("ray.io/", "app.kubernetes.io/")) for key in labels):
        return
    if obj.get("spec.maxUnavailable") is not None or not isinstance(obj.get("spec.minAvailable"), int):
        yield "spec", f"minAvailable {obj.get('spec.minAvailable')}, maxUnavailable {obj.get('spec.maxUnavailable')}"


RULES: tuple[AnyRule, ...] = (
    names_are_short_labels, replicas_are_ordered, pods_are_restricted,
    entry_point_is_ours, job_outlives_its_logs, build_has_deadlines, driver_is_off_the_head, head_takes_no_work,
    cluster_asks_for_a_token, requests_are_limits, pods_have_time_to_drain, images_are_pinned, manifests_hold_no_secret,
    secrets_are_made_elsewhere, gpus_have_a_type, root_is_read_only, budgets_are_counts,
)  # fmt: skip
