"""Where steps run when there is a Ray cluster: one actor per step, thin around `orchestrator.work`.

The only code that imports ray.
"""

from __future__ import annotations

from actors.cluster import RayCluster
from actors.jobs import Client, Submission

__all__ = ["Client", "RayCluster", "Submission"]
