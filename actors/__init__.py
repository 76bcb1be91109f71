"""Run steps on a Ray cluster: one actor per step, a thin layer around `orchestrator.work`.

The only code that imports ray. `Client` does without it: it speaks the REST API of the cluster.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.cluster import RayCluster
    from actors.jobs import Client, RaySubmission

__all__ = ["Client", "RayCluster", "RaySubmission"]

_PLACE_OF = {"Client": "jobs", "RayCluster": "cluster", "RaySubmission": "jobs"}


def __getattr__(name: str) -> Any:
    """Import a public name on first access: a worker needs none and would wait for their imports (PEP 562)."""
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
