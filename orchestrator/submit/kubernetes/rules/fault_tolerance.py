"""Fault tolerance of the head's store (GCS), as KubeRay's operator takes it (v1.7)."""

from __future__ import annotations

from orchestrator.submit.kubernetes.manifests import Cluster, environment
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule

_ENABLED, _NAMESPACE = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
_HEAD_ENV = "headGroupSpec.template.spec.containers[0].env"
_OPTIONS = "gcsFaultToleranceOptions"
_STORE_PATH = "/data/gcs"


@rule("FT01", Cluster, "Use gcsFaultToleranceOptions alone.")
def options_replace_annotations(cluster: Cluster) -> Found:
    """gcsFaultToleranceOptions stands alone, without the annotations that it replaced."""
    if cluster.get(_OPTIONS) is not None:
        for key in (_ENABLED, _NAMESPACE):
            if cluster.annotations.get(key):
                yield _OPTIONS, f"given beside the annotation {key}"


@rule("FT02", Cluster, "Give gcsFaultToleranceOptions.redisAddress, redisPassword and redisUsername instead.")
def redis_stands_in_options(cluster: Cluster) -> Found:
    """Redis' address, user and password stand in gcsFaultToleranceOptions, not in the head's environment or rayStartParams."""
    given, params = environment(cluster.head.ray), cluster.get("headGroupSpec.rayStartParams") or {}
    enabled, has_options = cluster.annotations.get(_ENABLED) == "true", cluster.get(_OPTIONS) is not None
    if "RAY_REDIS_ADDRESS" in given and (has_options or not enabled):
        yield _HEAD_ENV, "sets RAY_REDIS_ADDRESS"
    if has_options and "REDIS_PASSWORD" in given:
        yield _HEAD_ENV, "sets REDIS_PASSWORD"
    if has_options and params.get("redis-password"):
        yield "headGroupSpec.rayStartParams.redis-password", "given beside gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in given:
        yield _HEAD_ENV, "sets REDIS_USERNAME"
    if params.get("redis-username"):
        yield "headGroupSpec.rayStartParams.redis-username", "given"


@rule("FT03", Cluster, "Leave out the fields of the other backend; claimName stands alone, the other fields make a new claim.")
def backends_have_their_own_fields(cluster: Cluster) -> Found:
    """backend rocksdb takes storage, and backend redis the fields of Redis; a claimName excludes what would make a new claim."""
    options = cluster.get(_OPTIONS)
    if options is None:
        return
    if options.get("backend", "redis") != "rocksdb":
        if options.get("storage") is not None:
            yield f"{_OPTIONS}.storage", "given with backend redis"
        return
    for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(key):
            yield f"{_OPTIONS}.{key}", "given with backend rocksdb"
    storage = options.get("storage") or {}
    if storage.get("claimName"):
        for key in ("size", "storageClassName", "accessModes"):
            if storage.get(key):
                yield f"{_OPTIONS}.storage.{key}", "given beside claimName"


@rule("FT04", Cluster, "Leave mount and variables out: the operator brings them.")
def embedded_store_is_mounted_by_operator(cluster: Cluster) -> Found:
    """With backend rocksdb the head has no mount at /data/gcs and no variable of the operator's own."""
    if cluster.get(f"{_OPTIONS}.backend") != "rocksdb":
        return
    for name in ("RAY_gcs_storage", "RAY_gcs_storage_path"):
        if name in environment(cluster.head.ray):
            yield _HEAD_ENV, f"sets {name}"
    for mount in cluster.head.ray.get("volumeMounts") or []:
        if mount.get("mountPath") == _STORE_PATH:
            yield "headGroupSpec.template.spec.containers[0].volumeMounts", f"mounts {mount.get('name')} at {_STORE_PATH}"


RULES: tuple[AnyRule, ...] = (
    options_replace_annotations,
    redis_stands_in_options,
    backends_have_their_own_fields,
    embedded_store_is_mounted_by_operator,
)
