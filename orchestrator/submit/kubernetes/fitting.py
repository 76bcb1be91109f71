"""Check that the pods of a RayJob can run a build: a pool for every step, large enough pods, a lasting volume for every path.

The driver would find most problems, but only once machines are running and paid for. The rules BU01 to BU04 check the same files as
manifests; this module checks what depends on the spec's meaning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from orchestrator.base.errors import ClusterError
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.submit.bundle import named_files
from orchestrator.submit.kubernetes.manifests import Cluster, Fields, Group, at

GPU = "nvidia.com/gpu"
_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}


def check_fit(spec: BuildSpec, cluster_spec: ClusterSpec, job: Fields) -> None:
    """Check that the build can run in the RayJob's pods. Raises ClusterError with every problem."""
    cluster = Cluster("RayJob", "spec.rayClusterSpec", at(job, "spec.rayClusterSpec", {}))
    places = {"source.path": spec.source.path, "store": cluster_spec.store, **named_files(spec)}
    problems = [
        f"{field} is {path}, and group {group} mounts no volume there that outlives its pods"
        for field, path, group in unreachable(places, cluster)
    ]
    problems += _misfits(spec, cluster_spec, cluster)
    if problems:
        raise ClusterError(
            "the overlay's pods cannot run this build: " + "; ".join(problems),
            "Choose an overlay with such machines (`orchestrator k8s overlays`), or one of your own; places must be URLs of object "
            "storage, or below the mountPath of a volume that every group mounts.",
        )


def quantity(value: Any) -> float:
    """Return a Kubernetes quantity such as 8Gi, 500m or 2 as a number; 0 for None. Raises ClusterError."""
    match = re.fullmatch(r"([0-9.]+)([kMGTm]?i?)", str(value or 0))
    if match is None or match.group(2) not in _SUFFIXES:
        raise ClusterError(f"{value!r} is not a quantity such as 8Gi or 500m", "Correct the overlay's resources.")
    return float(match.group(1)) * _SUFFIXES[match.group(2)]


def unreachable(places: Mapping[str, str], cluster: Cluster) -> Iterator[tuple[str, str, str]]:
    """Yield paths of local disks that a pod would lack: field, path, a group that lacks it.

    Relative paths belong to files that travel with the spec.
    """
    for field, place in places.items():
        path = place.removeprefix("file://")
        without = [group.name for group in cluster.workers if not is_below(path, group.lasting_mounts)]
        if path.startswith("/") and (without or not cluster.workers):
            yield field, path, without[0] if without else "of workers"


def is_below(path: str, folders: Collection[str]) -> bool:
    """Whether a path is one of the folders, or below one."""
    return any(path == folder.rstrip("/") or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _misfits(spec: BuildSpec, cluster_spec: ClusterSpec, cluster: Cluster) -> Iterator[str]:
    seen = set()
    for kind, gpus in _kinds(spec).items():
        pool = cluster_spec.pool_for(kind)
        name = next((name for name, found in cluster_spec.pools.items() if found is pool), "")
        if pool is None:
            yield f"no pool of the cluster file runs {kind} steps"
        elif pool.gpus < gpus:
            yield f"{kind} steps need a GPU, and pool {name} has none"
        elif name not in seen:
            seen.add(name)
            yield from _pool_misfits(name, pool, cluster)


def _kinds(spec: BuildSpec) -> dict[str, int]:
    """Return the kinds of step that this build surely has, with the GPUs of one such step."""
    kinds = {"miniature": 0, "convert": 0, "build": 1 if spec.engine.backend == "tensorrt" else 0}
    if spec.verification.enabled:
        kinds |= dict.fromkeys(("reference", "verify"), 1 if spec.verification.device == "cuda" else 0)
    if "portable" in spec.release.include:
        kinds["export"] = 0
    if spec.quantization is not None and spec.quantization.calibration.device == "cuda":
        kinds["calibrate"] = 1
    return kinds


def _pool_misfits(name: str, pool: PoolSpec, cluster: Cluster) -> Iterator[str]:
    groups = cluster.selected(pool.labels)
    if not groups:
        return  # rule BU03 reports it
    wanted = {"gpus": pool.gpus, "cpus": pool.cpus or 0, "memory": pool.memory or 0}
    most = {what: max(_capacity(group)[what] for group in groups) for what in wanted}
    for what, amount in wanted.items():
        if most[what] < amount:
            yield f"pool {name} promises {amount:,} {what}, and its largest pod has {most[what]:,.0f}"


def _capacity(group: Group) -> dict[str, float]:
    """Return Ray's resources of one pod of a group: its own settings, else the start parameters, else the container's limits."""
    own, params = group.get("resources", {}) or {}, group.get("rayStartParams", {}) or {}
    limits = at(group.ray, "resources.limits", {}) or {}
    return {
        "gpus": quantity(own.get("GPU", params.get("num-gpus", limits.get(GPU)))),
        "cpus": quantity(own.get("CPU", params.get("num-cpus", limits.get("cpu")))),
        "memory": quantity(own.get("memory", params.get("memory", limits.get("memory")))),
    }
