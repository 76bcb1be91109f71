"""A build on its way to a cluster: the files that travel, and the one command that runs them there.

Whoever brings a build to a cluster (Ray's job API, a RayJob of Kubernetes) sends these files and runs ENTRYPOINT in the folder
that holds them. Spec and cluster file are decoded here first, so that a mistake is told before anything is sent.
"""

from __future__ import annotations

import yaml

from orchestrator.checkpoints.places import is_url
from orchestrator.core.digest import digest_of
from orchestrator.core.spec import BuildSpec, ClusterSpec

SPEC_FILE, CLUSTER_FILE = "spec.yaml", "cluster.yaml"
ENTRYPOINT = f"python -m orchestrator.cli build {SPEC_FILE} --cluster {CLUSTER_FILE} --json"
"""Says its events as JSON lines; ends with the build's own exit code."""


def bundle(spec: BuildSpec, place: ClusterSpec) -> dict[str, str]:
    """The files that travel, by name: YAML that decodes to the same values, with places made absolute by the loader."""
    return {
        SPEC_FILE: _dump(spec.model_dump(mode="json", exclude_unset=True)),
        CLUSTER_FILE: _dump(place.model_dump(mode="json", exclude_unset=True)),
    }


def submission_id(spec: BuildSpec, place: ClusterSpec) -> str:
    """The same build at the same store has the same id, so that a second submission finds the first.

    Also a DNS label, short enough for a RayJob of Kubernetes (47 characters).
    """
    wanted = {"spec": spec.model_dump(mode="json"), "store": place.store}
    name = "".join(character if character.isalnum() else "-" for character in spec.release.name.lower()).strip("-")
    return f"build-{name[:28].rstrip('-')}-{digest_of(wanted)[:12]}"


def is_local(path: str) -> bool:
    """Whether a place is a folder or file, which every node would have to have under the same path."""
    return not is_url(path)


def _dump(value: object) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
