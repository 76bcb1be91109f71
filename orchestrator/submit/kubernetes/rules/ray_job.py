"""What KubeRay's operator asks of a RayJob, and its schema does not (v1.7): a job that breaks one never starts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import yaml

from orchestrator.submit.kubernetes.manifests import Job
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_DELETES_CLUSTER = frozenset({"DeleteCluster", "DeleteWorkers"})
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


@rule("RJ01", Job, "Set shutdownAfterJobFinishes: true, or leave suspend out.")
def suspended_shuts_down(job: Job) -> Found:
    """A RayJob that may be suspended shuts its cluster down."""
    if job.get("suspend") and not job.get("shutdownAfterJobFinishes"):
        yield "suspend", "true, but shutdownAfterJobFinishes is not"


@rule("RJ02", Job, "Give 0 or more seconds, and shutdownAfterJobFinishes: true with more than 0.")
def time_to_live_needs_shutdown(job: Job) -> Found:
    """ttlSecondsAfterFinished is not negative, and above 0 only with shutdownAfterJobFinishes."""
    seconds = job.get("ttlSecondsAfterFinished", 0) or 0
    if seconds < 0:
        yield "ttlSecondsAfterFinished", f"{seconds} is negative"
    elif seconds > 0 and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished", f"{seconds}, but shutdownAfterJobFinishes is not true"


@rule("RJ03", Job, "Keep one of them: rules say when what is deleted, shutdownAfterJobFinishes deletes all of it.")
def deletion_rules_exclude_shutdown(job: Job) -> Found:
    """deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other."""
    if job.get("deletionStrategy.deletionRules") and job.get("shutdownAfterJobFinishes"):
        yield "deletionStrategy.deletionRules", "given beside shutdownAfterJobFinishes: true"


@rule("RJ04", Job, "Give deletionRules alone, or both onSuccess and onFailure, each with its policy.")
def deletion_strategy_is_whole(job: Job) -> Found:
    """A deletionStrategy has deletionRules, or else both onSuccess and onFailure."""
    strategy = job.get("deletionStrategy")
    if strategy is None:
        return
    rules, old = bool(strategy.get("deletionRules")), [key for key in ("onSuccess", "onFailure") if strategy.get(key) is not None]
    if rules and old:
        yield "deletionStrategy", f"deletionRules beside {' and '.join(old)}"
    elif not rules and len(old) < 2:
        yield "deletionStrategy", "neither deletionRules nor both onSuccess and onFailure"
    for key in old:
        if not job.get(f"deletionStrategy.{key}.policy"):
            yield f"deletionStrategy.{key}", "has no policy"


@rule("RJ05", Job, "Name jobStatus or jobDeploymentStatus, one of them, and 0 or more ttlSeconds.")
def deletion_conditions_are_single(job: Job) -> Found:
    """The condition of a deletion rule names exactly one status, and its time is not negative."""
    for number, item in enumerate(job.get("deletionStrategy.deletionRules", []) or []):
        condition, path = item.get("condition") or {}, f"deletionStrategy.deletionRules[{number}].condition"
        if (condition.get("jobStatus") is None) == (condition.get("jobDeploymentStatus") is None):
            yield path, "names not exactly one of jobStatus and jobDeploymentStatus"
        if (condition.get("ttlSeconds") or 0) < 0:
            yield f"{path}.ttlSeconds", f"{condition['ttlSeconds']} is negative"


@rule("RJ06", Job, "Use DeleteCluster or DeleteSelf, or turn enableInTreeAutoscaling off.")
def deleted_workers_are_not_scaled(job: Job) -> Found:
    """DeleteWorkers does not go with autoscaling, which would bring the workers back."""
    if job.get("rayClusterSpec.enableInTreeAutoscaling"):
        for path, policy, _ in _policies(job):
            if policy == "DeleteWorkers":
                yield path, "DeleteWorkers with enableInTreeAutoscaling"


@rule("RJ07", Job, "Use DeleteSelf or DeleteNone: a cluster that was selected is not the job's to delete.")
def selected_cluster_is_kept(job: Job) -> Found:
    """With clusterSelector no policy deletes the cluster or its workers."""
    if job.get("clusterSelector"):
        for path, policy, _ in _policies(job):
            if policy in _DELETES_CLUSTER:
                yield path, f"{policy} with clusterSelector"


@rule("RJ08", Job, "Leave out the second of the two, and order the times: workers first, then cluster, then the RayJob.")
def deletion_rules_are_ordered(job: Job) -> Found:
    """Of one status each policy has one rule, and what is deleted first has the shorter time."""
    times: dict[tuple[str, str], int] = {}
    for path, policy, condition in _policies(job):
        status = condition.get("jobStatus") or condition.get("jobDeploymentStatus")
        if status is None:
            continue
        if (status, policy) in times:
            yield path, f"a second rule of {policy} for {status}"
        times.setdefault((status, policy), condition.get("ttlSeconds") or 0)
    for status in {status for status, _ in times}:
        given = [(policy, times[status, policy]) for policy in _DELETION_ORDER if (status, policy) in times]
        for (first, early), (second, late) in pairwise(given):
            if late < early:
                yield (
                    "deletionStrategy.deletionRules",
                    f"for {status}, {second} after {late} s comes before {first} after {early} s",
                )


@rule("RJ09", Job, "Use another policy, or leave shutdownAfterJobFinishes out.")
def kept_cluster_is_not_shut_down(job: Job) -> Found:
    """DeleteNone of onSuccess or onFailure contradicts shutdownAfterJobFinishes."""
    if job.get("shutdownAfterJobFinishes"):
        for key in ("onSuccess", "onFailure"):
            if job.get(f"deletionStrategy.{key}.policy") == "DeleteNone":
                yield f"deletionStrategy.{key}.policy", "DeleteNone with shutdownAfterJobFinishes: true"


@rule("RJ10", Job, "Give rayClusterSpec, or a clusterSelector with `ray.io/cluster: NAME`.")
def cluster_is_given_or_selected(job: Job) -> Found:
    """A RayJob brings a cluster or selects one by name."""
    selector = job.get("clusterSelector")
    if not selector and job.get("rayClusterSpec") is None:
        yield "", "has neither rayClusterSpec nor clusterSelector"
    elif selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector", "does not name ray.io/cluster"


@rule("RJ11", Job, "Leave out suspend, SidecarMode and backoffLimit, or bring a rayClusterSpec.")
def selected_cluster_is_not_remade(job: Job) -> Found:
    """With clusterSelector there is no suspend, no SidecarMode and no backoffLimit above 0: they would make the cluster again."""
    if job.get("clusterSelector"):
        if job.get("suspend"):
            yield "suspend", "true with clusterSelector"
        if job.get("submissionMode") == "SidecarMode":
            yield "submissionMode", "SidecarMode with clusterSelector"
        if (job.get("backoffLimit") or 0) > 0:
            yield "backoffLimit", f"{job.get('backoffLimit')} with clusterSelector"


@rule("RJ12", Job, "Set backoffLimit: 0, or another submissionMode.")
def interactive_is_not_retried(job: Job) -> Found:
    """InteractiveMode does not retry."""
    if job.get("submissionMode") == "InteractiveMode" and (job.get("backoffLimit") or 0) > 0:
        yield "backoffLimit", f"{job.get('backoffLimit')} with InteractiveMode"


@rule("RJ13", Job, "Leave them out, or use HTTPMode; let the head's restartPolicy be Never.")
def sidecar_submits_by_itself(job: Job) -> Found:
    """SidecarMode has no submitter of its own to configure, and its head is never restarted."""
    if job.get("submissionMode") != "SidecarMode":
        return
    for key in ("submitterPodTemplate", "submitterConfig"):
        if job.get(key) is not None:
            yield key, "given with SidecarMode"
    policy = job.get("rayClusterSpec.headGroupSpec.template.spec.restartPolicy")
    if policy not in {None, "Never"}:
        yield "rayClusterSpec.headGroupSpec.template.spec.restartPolicy", f"{policy} with SidecarMode"


@rule("RJ14", Job, "Leave enableK8sTokenAuth out: with mode token the operator makes a token of its own.")
def job_has_no_kubernetes_token(job: Job) -> Found:
    """Authentication by Kubernetes' own tokens is not for RayJobs."""
    if job.get("rayClusterSpec.authOptions.enableK8sTokenAuth"):
        yield "rayClusterSpec.authOptions.enableK8sTokenAuth", "true in a RayJob"


@rule("RJ15", Job, "Correct the YAML: a mapping such as `env_vars: {NAME: value}`.")
def runtime_environment_is_yaml(job: Job) -> Found:
    """runtimeEnvYAML is a mapping written as YAML."""
    text = job.get("runtimeEnvYAML")
    if not text:
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield "runtimeEnvYAML", f"is not YAML: {str(error).splitlines()[0]}"
        return
    if not isinstance(value, dict):
        yield "runtimeEnvYAML", f"is a {type(value).__name__}, not a mapping"


@rule("RJ16", Job, "Give a number above 0, or leave the field out; backoffLimit may be 0.")
def deadlines_are_positive(job: Job) -> Found:
    """Deadlines are above 0, and backoffLimit is not below it."""
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job.get(key) is not None and job.get(key) <= 0:
            yield key, f"{job.get(key)} is not above 0"
    if (job.get("backoffLimit") or 0) < 0:
        yield "backoffLimit", f"{job.get('backoffLimit')} is negative"


@rule("RJ17", Job, f"Use one of {', '.join(SUBMISSION_MODES)}.")
def submission_mode_is_known(job: Job) -> Found:
    """submissionMode is one that the operator knows; the schema takes any text, and the job never starts."""
    if job.get("submissionMode", "K8sJobMode") not in SUBMISSION_MODES:
        yield "submissionMode", f"{job.get('submissionMode')!r} is unknown"


@rule("RJ18", Job, "Leave upgradeStrategy out: the cluster of a job lives as long as the job.")
def job_cluster_is_not_upgraded(job: Job) -> Found:
    """The cluster of a RayJob has no upgradeStrategy."""
    if job.get("rayClusterSpec.upgradeStrategy.type") is not None:
        yield "rayClusterSpec.upgradeStrategy.type", f"is {job.get('rayClusterSpec.upgradeStrategy.type')}"


def _policies(job: Job) -> list[tuple[str, str, dict[str, Any]]]:
    """Path, policy and condition of everything that a deletion strategy deletes; the old fields have no condition."""
    rules = job.get("deletionStrategy.deletionRules", []) or []
    found = [
        (f"deletionStrategy.deletionRules[{number}]", str(item.get("policy", "")), item.get("condition") or {})
        for number, item in enumerate(rules)
    ]
    old = [(key, job.get(f"deletionStrategy.{key}.policy")) for key in ("onSuccess", "onFailure")]
    return found + [(f"deletionStrategy.{key}.policy", str(policy), {}) for key, policy in old if policy]


RULES: tuple[AnyRule, ...] = (
    suspended_shuts_down, time_to_live_needs_shutdown, deletion_rules_exclude_shutdown, deletion_strategy_is_whole,
    deletion_conditions_are_single, deleted_workers_are_not_scaled, selected_cluster_is_kept, deletion_rules_are_ordered,
    kept_cluster_is_not_shut_down, cluster_is_given_or_selected, selected_cluster_is_not_remade, interactive_is_not_retried,
    sidecar_submits_by_itself, job_has_no_kubernetes_token, runtime_environment_is_yaml, deadlines_are_positive,
    submission_mode_is_known, job_cluster_is_not_upgraded,
)  # fmt: skip
