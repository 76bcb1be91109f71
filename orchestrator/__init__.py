"""Build, verify and publish TensorRT engines of large language models.

    import orchestrator

    spec = orchestrator.load_spec(Path("spec.yaml"))
    print(orchestrator.plan(spec).build_key)
    done = orchestrator.build(spec, orchestrator.ClusterSpec(store="file:///tmp/engines"))

The names in __all__ are public. Their modules are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.base.errors import OrchestratorError as OrchestratorError
    from orchestrator.building import Build as Build
    from orchestrator.building import build as build
    from orchestrator.model.topology import Topology as Topology
    from orchestrator.planning.plan import Plan as Plan
    from orchestrator.planning.preparation import plan as plan
    from orchestrator.releases import pull as pull
    from orchestrator.releases import read_release as read_release
    from orchestrator.releases.manifest import Manifest as Manifest
    from orchestrator.runners.model import run as run
    from orchestrator.spec.build import BuildConfig as BuildConfig
    from orchestrator.spec.build import BuildSpec as BuildSpec
    from orchestrator.spec.cluster import ClusterSpec as ClusterSpec
    from orchestrator.spec.loading import load_cluster as load_cluster
    from orchestrator.spec.loading import load_spec as load_spec
    from orchestrator.stages import convert as convert

_PLACES = {
    "base.errors": ("OrchestratorError",),
    "releases.manifest": ("Manifest",),
    "planning.plan": ("Plan",),
    "planning.preparation": ("plan",),
    "spec.build": ("BuildConfig", "BuildSpec"),
    "spec.cluster": ("ClusterSpec",),
    "model.topology": ("Topology",),
    "spec.loading": ("load_cluster", "load_spec"),
    "releases": ("pull", "read_release"),
    "runners.model": ("run",),
    "building": ("Build", "build"),
    "stages": ("convert",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
__all__ = sorted(_PLACE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), because a worker needs few of them."""
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
