"""Clusters that run steps: processes of this machine, MPI ranks, a simulation. Ray is in actors/."""

from __future__ import annotations

from orchestrator.scheduling.cluster import Cluster
from orchestrator.spec.cluster import ClusterSpec


def local_cluster(cluster_spec: ClusterSpec) -> Cluster:
    """Return a cluster of processes of this machine."""
    from orchestrator.clusters.local import LocalCluster

    return LocalCluster(cluster_spec)
