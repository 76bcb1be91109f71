"""Rules for a build's files and the cluster that runs it: a pool that selects no pod is a step that never starts."""

from __future__ import annotations

from typing import TypeVar

from orchestrator.base.errors import SpecError
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import Frozen, decode_yaml
from orchestrator.submit.bundle import CLUSTER_FILE, SPEC_FILE, named_files
from orchestrator.submit.kubernetes.fitting import is_below, unreachable
from orchestrator.submit.kubernetes.manifests import Bundle, at
from orchestrator.submit.kubernetes.rules.rule import AnyRule, Found, rule

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
    places = {}
    if place is not None:
        if place.kind != "ray" or place.address not in {None, "auto"}:
            yield f"{CLUSTER_FILE}: address", f"is {place.address} of kind {place.kind}"
        if place.store.startswith("memory://"):
            yield f"{CLUSTER_FILE}: store", f"{place.store} is gone with the pod that writes it"
        builders = bundle.cluster.selected({})
        if place.scratch is not None and not (builders and all(is_below(place.scratch, group.mounts) for group in builders)):
            yield f"{CLUSTER_FILE}: scratch", f"{place.scratch} is on no volume that all builders mount"
        places[f"{CLUSTER_FILE}: store"] = place.store
    if spec is not None:
        places |= {f"{SPEC_FILE}: {field}": path for field, path in {"source.path": spec.source.path, **named_files(spec)}.items()}
    for field, path, _ in unreachable(places, bundle.cluster):
        yield field, f"{path} is on no volume that outlives the pods and that all workers mount"


@rule("BU03", Bundle, "Give the pool the labels of a worker group, or the worker group those of the pool.")
def pools_select_groups(bundle: Bundle) -> Found:
    """The labels of every pool select a worker group that takes work."""
    place = _read(bundle, CLUSTER_FILE, ClusterSpec)
    for name, pool in place.pools.items() if place is not None else ():
        if not bundle.cluster.selected(pool.labels):
            yield f"{CLUSTER_FILE}: pools.{name}.labels", f"{pool.labels} select no worker group with CPUs"


@rule("BU04", Bundle, "Let the pool of the build step select GPUs of one type, or set engine.backend: tensorrt_rtx.")
def engines_are_built_on_their_gpu(bundle: Bundle) -> Found:
    """engine.backend tensorrt builds for the GPU that it runs on: the pool of the build step selects GPUs of one type."""
    place, spec = _read(bundle, CLUSTER_FILE, ClusterSpec), _read(bundle, SPEC_FILE, BuildSpec)
    if place is None or spec is None or spec.engine.backend != "tensorrt":
        return
    pool = place.pool_for("build")
    groups = bundle.cluster.selected(pool.labels) if pool is not None else []
    types = {(group.get("labels") or {}).get(_ACCELERATOR) for group in groups}
    if len(types) != 1 or not all(at(group.ray, "resources.limits", {}).get(_GPU) for group in groups):
        yield f"{CLUSTER_FILE}: pools", f"the build step's pool selects groups of GPU types {sorted(map(str, types))}"


def _decode(bundle: Bundle, name: str, model: type[T]) -> T:
    if name not in bundle.files:
        raise SpecError(f"{name} is missing")
    return decode_yaml(model, str(bundle.files[name]), name)


def _read(bundle: Bundle, name: str, model: type[T]) -> T | None:
    """Decode a file of the bundle; None when it does not decode, which BU01 reports."""
    try:
        return _decode(bundle, name, model)
    except SpecError:
        return None


RULES: tuple[AnyRule, ...] = (files_decode, places_are_reached_from_pods, pools_select_groups, engines_are_built_on_their_gpu)
