"""Render the manifests of a build from its spec and an overlay's objects. Pure: objects in, objects out.

An overlay describes a build named BASE. Objects of that name (the RayJob, the bundle's ConfigMap, disruption budgets, the labels
that select its pods) get the build's name. Others (service account, network policies) are shared by all builds of a namespace.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.base.errors import ManifestError, SpecError
from orchestrator.releases.manifest import release_prefix
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode_yaml
from orchestrator.submit.bundle import CLUSTER_FILE, ENTRYPOINT, bundle, submission_id
from orchestrator.submit.kubernetes.fitting import check_fit
from orchestrator.submit.kubernetes.manifests import Fields, at
from orchestrator.submit.kubernetes.rules import validate

BASE = "build"
INSTANCE, MANAGED_BY = "app.kubernetes.io/instance", "app.kubernetes.io/managed-by"
PART_OF = "app.kubernetes.io/part-of"
MANAGER = "trt-orchestrator"
"""Value of both labels on all our objects, and the field manager of what we apply."""
SUBMISSION, RELEASE, STORE = f"{MANAGER}/submission", f"{MANAGER}/release", f"{MANAGER}/store"
"""Annotations of a RayJob: its build, the release's address, and the store of its events."""
PLACEHOLDERS = ("://BUCKET", "://REGISTRY", "registry.example.com/")
"""Placeholder in the overlays for values that the user must give."""
MAX_CONFIG_MAP_BYTES = 2**20


@dataclass(frozen=True)
class Rendered:
    """Manifests of a build, in the order in which they are applied."""

    name: str
    """Name of the RayJob."""
    namespace: str
    job: Fields
    owned: tuple[Fields, ...]
    """Other objects of this build only: deleted with the RayJob."""
    shared: tuple[Fields, ...]
    """Objects of the namespace or the whole cluster."""

    @property
    def objects(self) -> tuple[Fields, ...]:
        return (*self.shared, *self.owned, self.job)

    def to_yaml(self) -> str:
        return str(yaml.safe_dump_all(self.objects, sort_keys=False, allow_unicode=True))

    def write(self, folder: Path) -> list[Path]:
        """Write one file per object, replacing existing files; returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for obj in self.objects:
            paths.append(folder / f"{str(obj['kind']).lower()}-{obj['metadata']['name']}.yaml")
            paths[-1].write_text(str(yaml.safe_dump(obj, sort_keys=False, allow_unicode=True)))
        return paths


def overlay_cluster(objects: list[Fields]) -> ClusterSpec:
    """Return the cluster file in an overlay's bundle, which describes its pods. Raises ManifestError, SpecError."""
    text = at(_config_map(objects), "data", {}).get(CLUSTER_FILE)
    if text is None:
        raise ManifestError(
            f"ConfigMap/{BASE} of the overlay holds no {CLUSTER_FILE}", f"Add it to the files of its {BASE} generator."
        )
    return decode_yaml(ClusterSpec, str(text), f"{CLUSTER_FILE} of the overlay")


def render(
    spec: BuildSpec,
    cluster_spec: ClusterSpec,
    objects: list[Fields],
    *,
    name: str | None = None,
    namespace: str | None = None,
    images: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Rendered:
    """Render the manifests of one build. `name`: absent, that of submission_id; `namespace`: absent, the overlay's.

    `files` travel with the spec, which names them by these paths (bundle.pack). `images` replaces images by the last part of their
    name (trt-orchestrator-gpu); "" replaces all others. Raises ManifestError when the overlay holds no build or the result breaks a
    rule, ClusterError when its pods cannot run this build, SpecError when a placeholder is left or the files do not fit.
    """
    made = copy.deepcopy(objects)
    job, config = _job(made), _config_map(made)
    check_fit(spec, cluster_spec, job)
    _refuse_placeholder(cluster_spec.store, "the store", "Name yours with --store, or in a cluster file with --cluster.")
    name = name or submission_id(spec, cluster_spec)
    _fill(config, bundle(spec, cluster_spec), files or {})
    _set_images(made, images or {})
    _rename(made, name)
    if files:
        _place_files(made, name, config["data"], files)
    for obj in made:
        if namespace is not None and "namespace" in obj.get("metadata", {}):
            obj["metadata"]["namespace"] = namespace
        obj["metadata"].setdefault("labels", {})[MANAGED_BY] = MANAGER
    job["metadata"]["labels"][INSTANCE] = name
    job["metadata"].setdefault("annotations", {}).update(
        {
            SUBMISSION: submission_id(spec, cluster_spec),
            RELEASE: f"{cluster_spec.store.rstrip('/')}/{release_prefix(spec.release.name, spec.release.version)}".rstrip("/"),
            STORE: cluster_spec.store,
        }
    )
    validate(made)
    own = [obj for obj in made if obj is not job and _is_own(str(at(obj, "metadata.name", "")), name)]
    shared = [obj for obj in made if obj is not job and obj not in own]
    return Rendered(name, str(at(job, "metadata.namespace", "default")), job, tuple(own), tuple(shared))


def refuse_placeholder_images(rendered: Rendered) -> None:
    """Check that no pod uses an image of the examples. Raises SpecError."""
    for container in _containers(rendered.job):
        image = str(container.get("image", ""))
        _refuse_placeholder(image, "an image", "Name yours with --image, or in the kustomization of an overlay of your own.")


def _refuse_placeholder(text: str, what: str, advice: str) -> None:
    if any(placeholder in text for placeholder in PLACEHOLDERS):
        raise SpecError(f"{what} is still the placeholder {text}", advice)


def _job(objects: list[Fields]) -> Fields:
    found = [obj for obj in objects if obj.get("kind") == "RayJob"]
    if len(found) != 1:
        raise ManifestError(
            f"the overlay holds {len(found)} RayJobs, one is needed",
            "For a Ray cluster that stays, apply the overlay once and send builds to it with `orchestrator submit`.",
        )
    if at(found[0], "metadata.name") != BASE:
        raise ManifestError(
            f"the overlay's RayJob is not named {BASE}", f"Name it {BASE}: `orchestrator k8s` gives it its own name."
        )
    if at(found[0], "spec.entrypoint") != ENTRYPOINT:
        raise ManifestError(f"the overlay's RayJob does not run `{ENTRYPOINT}`", "Keep the base's spec.entrypoint.")
    return found[0]


def _config_map(objects: list[Fields]) -> Fields:
    found = [obj for obj in objects if obj.get("kind") == "ConfigMap" and at(obj, "metadata.name") == BASE]
    if len(found) != 1:
        raise ManifestError(f"the overlay holds {len(found)} ConfigMaps named {BASE}, one is needed", "Keep the base's generator.")
    return found[0]


def _fill(config: Fields, texts: Mapping[str, str], files: Mapping[str, bytes]) -> None:
    """Put the bundle into its ConfigMap. Raises SpecError when it is too large."""
    size = sum(len(name) + len(text.encode()) for name, text in texts.items()) + sum(len(data) for data in files.values())
    if size >= MAX_CONFIG_MAP_BYTES:
        raise SpecError(
            f"the spec and the files that it names are {size:,} bytes, a ConfigMap holds {MAX_CONFIG_MAP_BYTES:,}",
            "Put large files on a volume that every group mounts; shorten what is long in the spec (verification.prompts).",
        )
    config["data"] = dict(texts)
    if files:
        config["binaryData"] = {_key(number): base64.b64encode(data).decode() for number, data in enumerate(files.values())}


def _key(number: int) -> str:
    return f"file-{number}"


def _place_files(objects: list[Fields], name: str, texts: Mapping[str, str], files: Mapping[str, bytes]) -> None:
    """Set the paths of the bundle's files in its volumes, because keys of a ConfigMap hold no '/'."""
    items = [{"key": path, "path": path} for path in texts]
    items += [{"key": _key(number), "path": path} for number, path in enumerate(files)]
    for found in _mappings(objects):
        volume = found.get("configMap")
        if isinstance(volume, dict) and volume.get("name") == name:
            volume["items"] = items


def _is_own(name: str, base: str) -> bool:
    return name == base or name.startswith(f"{base}-")


def _rename(objects: list[Fields], name: str) -> None:
    for obj in objects:
        old = str(at(obj, "metadata.name", ""))
        if _is_own(old, BASE) and "namespace" in obj["metadata"]:
            obj["metadata"]["name"] = name + old.removeprefix(BASE)
        for found in _mappings(obj):
            if found.get(INSTANCE) == BASE:
                found[INSTANCE] = name
            volume = found.get("configMap")
            if isinstance(volume, dict) and volume.get("name") == BASE:
                volume["name"] = name


def _set_images(objects: list[Fields], images: Mapping[str, str]) -> None:
    known = set()
    for obj in objects:
        for container in _containers(obj):
            last = str(container.get("image", "")).rpartition("/")[2].partition("@")[0].partition(":")[0]
            known.add(last)
            container["image"] = images.get(last, images.get("", container.get("image")))
    unknown = sorted(set(images) - known - {""})
    if unknown:
        raise SpecError(f"no container runs an image named {', '.join(unknown)}", f"The overlay's: {', '.join(sorted(known))}.")


def _containers(value: Any) -> Iterator[Fields]:
    for found in _mappings(value):
        for key in ("containers", "initContainers"):
            yield from (item for item in found.get(key) or [] if isinstance(item, dict) and "image" in item)


def _mappings(value: Any) -> Iterator[Fields]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _mappings(inner)
