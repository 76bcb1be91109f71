"""Whether the pods of a RayJob can run a build: every step a pool, every pool pods large enough, every path a volume that lasts.

The driver would find most of it out, but only once machines are running and paid for. The rules BU01 to BU04 look at the same
files as manifests; here is what needs the meaning of the spec.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from orchestrator.base.errors import ClusterError
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.submit.kubernetes.manifests import Cluster, Fields, Group, at
from orchestrator.submit.submission import is_local

GPU = "nvidia.com/gpu"
_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}


def check_fit(spec: BuildSpec, cluster_spec: ClusterSpec, job: Fields, files: Collection[str] = ()) -> None:
    """Whether it runs in the RayJob's pods; `files` are paths that travel with the spec.

    Raises ClusterError that says everything that is in the way.
    """
    cluster = Cluster("RayJob", "spec.rayClusterSpec", at(job, "spec.rayClusterSpec", {}), job)
    problems = [*_unreachable(spec, cluster_spec, cluster, files), *_misfits(spec, cluster_spec, cluster)]
    if problems:
        raise ClusterError(
            "the overlay's pods cannot run this build: " + "; ".join(problems),
            "Choose an overlay with such machines (`orchestrator k8s overlays`), or one of your own; places must be URLs of object "
            "storage, or below the mountPath of a volume that every group mounts.",
        )


def quantity(value: Any) -> float:
    """A quantity of Kubernetes such as 8Gi, 500m or 2, as a number; 0 for none. Raises ClusterError."""
    match = re.fullmatch(r"([0-9.]+)([kMGTm]?i?)", str(value or 0))
    if match is None or match.group(2) not in _SUFFIXES:
        raise ClusterError(f"{value!r} is not a quantity such as 8Gi or 500m", "Correct the overlay's resources.")
    return float(match.group(1)) * _SUFFIXES[match.group(2)]


def _unreachable(spec: BuildSpec, cluster_spec: ClusterSpec, cluster: Cluster, files: Collection[str]) -> Iterator[str]:
    """Places on somebody's own disk that a pod would look for in vain."""
    for field, path in _local_places(spec, cluster_spec):
        if any(_is_below(file, path) for file in files):
            continue
        without = [group.name for group in cluster.workers if not any(_is_below(path, mount) for mount in group.lasting_mounts)]
        if without:
            yield f"{field} is {path}, and group {without[0]} mounts no volume there that outlives its pods"


def _local_places(spec: BuildSpec, cluster_spec: ClusterSpec) -> Iterator[tuple[str, str]]:
    quantization = spec.quantization
    places = {"source.path": spec.source.path, "store": cluster_spec.store.removeprefix("file://")}
    if quantization is not None:
        dataset = quantization.calibration.dataset
        places |= {
            "quantization.quant_cfg": quantization.quant_cfg or "",
            "quantization.scales": quantization.scales or "",
            "quantization.calibration.dataset": dataset if dataset.endswith((".txt", ".jsonl", ".parquet")) else "",
        }
    yield from ((field, path) for field, path in places.items() if path and is_local(path))


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _misfits(spec: BuildSpec, cluster_spec: ClusterSpec, cluster: Cluster) -> Iterator[str]:
    told = set()
    for kind, gpus in _kinds(spec).items():
        pool = cluster_spec.pool_for(kind)
        name = next((name for name, found in cluster_spec.pools.items() if found is pool), "")
        if pool is None:
            yield f"no pool of the cluster file runs {kind} steps"
        elif pool.gpus < gpus:
            yield f"{kind} steps need a GPU, and pool {name} has none"
        elif name not in told:
            told.add(name)
            yield from _pool_misfits(name, pool, cluster)


def _kinds(spec: BuildSpec) -> dict[str, int]:
    """Kinds of step that this build surely has, and the GPUs that one such step takes."""
    kinds = {"miniature": 0, "convert": 0, "build": 1 if spec.engine.backend == "tensorrt" else 0}
    if spec.verification.enabled:
        kinds |= {"reference": 0, "verify": 0}
    if spec.quantization is not None and spec.quantization.calibration.device == "cuda":
        kinds["calibrate"] = 1
    return kinds


def _pool_misfits(name: str, pool: PoolSpec, cluster: Cluster) -> Iterator[str]:
    groups = [group for group in cluster.workers if pool.labels.items() <= (group.get("labels") or {}).items()]
    if not groups:
        return  # rule BU03 tells
    wanted = {"gpus": pool.gpus, "cpus": pool.cpus or 0, "memory": pool.memory or 0}
    most = {what: max(_capacity(group)[what] for group in groups) for what in wanted}
    for what, amount in wanted.items():
        if most[what] < amount:
            yield f"pool {name} promises {amount:,} {what}, and its largest pod has {most[what]:,.0f}"


def _capacity(group: Group) -> dict[str, float]:
    """What Ray offers on one pod of a group: its own resources, else the start parameters, else the container's limits."""
    own, params = group.get("resources", {}) or {}, group.get("rayStartParams", {}) or {}
    limits = at(group.ray, "resources.limits", {}) or {}
    return {
        "gpus": quantity(own.get("GPU", params.get("num-gpus", limits.get(GPU)))),
        "cpus": quantity(own.get("CPU", params.get("num-cpus", limits.get("cpu")))),
        "memory": quantity(own.get("memory", params.get("memory", limits.get("memory")))),
    }
