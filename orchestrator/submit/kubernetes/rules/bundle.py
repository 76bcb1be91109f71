"""What the files of a build say of the cluster that runs it: a pool that selects no pod is a step that waits for ever."""

from __future__ import annotations

from typing import TypeVar

from orchestrator.base.errors import SpecError
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.spec.decoding import Frozen, decode_yaml
from orchestrator.submit.kubernetes.manifests import Bundle, Group, at
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule
from orchestrator.submit.submission import CLUSTER_FILE, SPEC_FILE, is_local

T = TypeVar("T", bound=Frozen)
_ACCELERATOR, _GPU = "ray.io/accelerator-type", "nvidia.com/gpu"


@rule("BU01", Bundle, "Correct the named field; `orchestrator schema build|cluster` prints every field.")
def files_decode(bundle: Bundle) -> Found:
    """The ConfigMap holds a build spec and a cluster file, and both decode."""
    for name, model in ((SPEC_FILE, BuildSpec), (CLUSTER_FILE, ClusterSpec)):
        try:
            _decode(bundle, name, model)
        except SpecError as error:
            yield name, error.message


@rule(
    "BU02",
    Bundle,
    "Set kind: ray and address: auto, a store such as s3://BUCKET/builds, and the source beside it or on a volume that outlives "
    "the pods.",
)
def places_are_reached_from_pods(bundle: Bundle) -> Found:
    """The driver joins the Ray cluster that it runs in, and every pod reaches source and store."""
    place, spec = _read(bundle, CLUSTER_FILE, ClusterSpec), _read(bundle, SPEC_FILE, BuildSpec)
    if place is not None:
        if place.kind != "ray" or place.address not in {None, "auto"}:
            yield f"{CLUSTER_FILE}: address", f"is {place.address} of kind {place.kind}"
        if place.store.startswith("memory://") or (
            is_local(place.store.removeprefix("file://")) and not _lasts(bundle, place.store)
        ):
            yield f"{CLUSTER_FILE}: store", f"{place.store} is on no volume that outlives the pods and that all workers mount"
        if place.scratch is not None and not _is_mounted(bundle, place.scratch):
            yield f"{CLUSTER_FILE}: scratch", f"{place.scratch} is on no volume that all builders mount"
    if spec is not None and is_local(spec.source.path) and not _lasts(bundle, spec.source.path):
        yield f"{SPEC_FILE}: source.path", f"{spec.source.path} is on no volume that outlives the pods and that all workers mount"


@rule("BU03", Bundle, "Give the pool the labels of a worker group, or the worker group those of the pool.")
def pools_select_groups(bundle: Bundle) -> Found:
    """The labels of every pool select a worker group that takes work."""
    place = _read(bundle, CLUSTER_FILE, ClusterSpec)
    for name, pool in place.pools.items() if place is not None else ():
        if not _selected(bundle, pool):
            yield f"{CLUSTER_FILE}: pools.{name}.labels", f"{pool.labels} select no worker group with CPUs"


@rule("BU04", Bundle, "Let the pool of the build step select GPUs of one type, or set engine.backend: tensorrt_rtx.")
def engines_are_built_on_their_gpu(bundle: Bundle) -> Found:
    """engine.backend tensorrt builds for the GPU that it runs on: the pool of the build step selects GPUs of one type."""
    place, spec = _read(bundle, CLUSTER_FILE, ClusterSpec), _read(bundle, SPEC_FILE, BuildSpec)
    if place is None or spec is None or spec.engine.backend != "tensorrt":
        return
    pool = place.pool_for("build")
    groups = _selected(bundle, pool) if pool is not None else []
    types = {(group.get("labels") or {}).get(_ACCELERATOR) for group in groups}
    if len(types) != 1 or not all(at(group.ray, "resources.limits", {}).get(_GPU) for group in groups):
        yield f"{CLUSTER_FILE}: pools", f"the build step's pool selects groups of GPU types {sorted(map(str, types))}"


def _decode(bundle: Bundle, name: str, model: type[T]) -> T:
    if name not in bundle.files:
        raise SpecError(f"{name} is not there")
    return decode_yaml(model, str(bundle.files[name]), name)


def _read(bundle: Bundle, name: str, model: type[T]) -> T | None:
    """None where BU01 says what is wrong."""
    try:
        return _decode(bundle, name, model)
    except SpecError:
        return None


def _selected(bundle: Bundle, pool: PoolSpec) -> list[Group]:
    return [group for group in _working(bundle) if pool.labels.items() <= (group.get("labels") or {}).items()]


def _working(bundle: Bundle) -> list[Group]:
    """Worker groups that steps can run in: those without resources that the driver takes for itself."""
    return [group for group in bundle.cluster.workers if "driver" not in (group.get("resources") or {})]


def _is_mounted(bundle: Bundle, place: str) -> bool:
    """Whether it lies on a volume of whatever kind in every group that takes work."""
    mounts = [[str(mount.get("mountPath")) for mount in group.ray.get("volumeMounts") or []] for group in _working(bundle)]
    return _is_in_all(place, mounts)


def _lasts(bundle: Bundle, place: str) -> bool:
    """Whether it lies on a volume that outlives its pods in every group of workers, the driver's among them."""
    return _is_in_all(place, [group.lasting_mounts for group in bundle.cluster.workers])


def _is_in_all(place: str, groups: list[list[str]]) -> bool:
    path = place.removeprefix("file://")
    return bool(groups) and all(
        any(path == mount.rstrip("/") or path.startswith(mount.rstrip("/") + "/") for mount in mounts) for mounts in groups
    )


RULES: tuple[AnyRule, ...] = (files_decode, places_are_reached_from_pods, pools_select_groups, engines_are_built_on_their_gpu)
