"""The kustomize overlays from which a build's manifests are made: deploy/kuberay of the repository, or a folder like it.

The package holds the same folder (a link in the repository, a copy in a wheel), so `kubectl apply -k` and this program share it.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.base.errors import ManifestError
from orchestrator.submit.kubernetes.manifests import Fields, load_manifests

OWN = Path(__file__).parent / "kuberay"
"""Folder of the overlays that come with the package."""


def overlay_names(deploy: Path = OWN) -> list[str]:
    """Return the names that `load_overlay` accepts, sorted."""
    return sorted(path.parent.name for path in (deploy / "overlays").glob("*/kustomization.yaml"))


def load_overlay(name: str, deploy: Path = OWN) -> list[Fields]:
    """Read the objects of an overlay, by its name in `deploy` or by the path of a folder with a kustomization.

    Raises ManifestError for an unknown overlay or one that kustomize refuses, ToolError without kubectl.
    """
    own = deploy / "overlays" / name
    folder = own if (own / "kustomization.yaml").is_file() else Path(name)
    if not (folder / "kustomization.yaml").is_file():
        known = ", ".join(overlay_names(deploy)) or f"none in {deploy}"
        raise ManifestError(
            f"there is no overlay {name}", f"Known: {known}. Or give the path of a folder with a kustomization.yaml."
        )
    return load_manifests(folder.resolve())
