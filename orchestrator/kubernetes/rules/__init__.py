"""What must hold of manifests before they go to a cluster: one file per matter, one small rule per thing, the table here.

Ids are stable. RJ and RC are the operator's own rules for RayJobs and RayClusters, which it tells only after a manifest was taken.
"""

from __future__ import annotations

from orchestrator.kubernetes.rules import ray_job
from orchestrator.kubernetes.rules.rule import AnyRule, Problem

RULES: tuple[AnyRule, ...] = ray_job.RULES

__all__ = ["RULES", "AnyRule", "Problem"]
