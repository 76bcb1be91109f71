"""What must hold of manifests before they go to a cluster: one file per matter, one small rule per thing, the table here.

Ids are stable. The operator tells its own rules (RN, RJ, RC, FT, RA) only after a manifest was taken, and then nothing starts.
"""

from __future__ import annotations

from orchestrator.submit.kubernetes.rules import (
    build,
    bundle,
    fault_tolerance,
    kueue,
    naming,
    pod_security,
    protection,
    ray_cluster,
    ray_job,
)
from orchestrator.submit.kubernetes.rules.rule import TYPES, AnyRule, Problem

RULES: tuple[AnyRule, ...] = (
    *naming.RULES,
    *ray_job.RULES,
    *ray_cluster.RULES,
    *fault_tolerance.RULES,
    *protection.RULES,
    *kueue.RULES,
    *pod_security.RULES,
    *build.RULES,
    *bundle.RULES,
)

__all__ = ["RULES", "TYPES", "AnyRule", "Problem"]
