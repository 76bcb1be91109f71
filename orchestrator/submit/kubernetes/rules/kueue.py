"""What Kueue asks of a RayJob that waits in one of its queues."""

from __future__ import annotations

from orchestrator.submit.kubernetes.manifests import Job
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule

QUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
MAX_WORKER_GROUPS = 17


@rule("KQ01", Job, "Set shutdownAfterJobFinishes: true and bring a rayClusterSpec.")
def queued_job_brings_its_cluster(job: Job) -> Found:
    """A queued RayJob brings its own cluster and shuts it down, so that its quota comes back."""
    if QUEUE not in job.labels:
        return
    if not job.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes", "is not true"
    if job.get("clusterSelector"):
        yield "clusterSelector", "is given"


@rule("KQ02", Job, f"Join groups of the same machines: at most {MAX_WORKER_GROUPS}.")
def queued_job_has_few_groups(job: Job) -> Found:
    """A queued RayJob has no more worker groups than a workload of Kueue has places for."""
    groups = len(job.get("rayClusterSpec.workerGroupSpecs", []) or [])
    if QUEUE in job.labels and groups > MAX_WORKER_GROUPS:
        yield "rayClusterSpec.workerGroupSpecs", f"has {groups} groups"


@rule("KQ03", Job, f'Turn enableInTreeAutoscaling off, or use elastic jobs: the annotation {ELASTIC}: "true".')
def queued_job_keeps_its_size(job: Job) -> Found:
    """A queued RayJob does not scale by itself, unless it is an elastic job of Kueue's."""
    if QUEUE in job.labels and job.get("rayClusterSpec.enableInTreeAutoscaling") and job.annotations.get(ELASTIC) != "true":
        yield "rayClusterSpec.enableInTreeAutoscaling", "is true"


RULES: tuple[AnyRule, ...] = (queued_job_brings_its_cluster, queued_job_has_few_groups, queued_job_keeps_its_size)
