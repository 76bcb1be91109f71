"""Where steps run when there is a Ray cluster: one actor per step, thin around `orchestrator.work`.

The only code that imports ray.
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
    """Import a public name when it is first asked for: a worker needs none of them, and waits for their imports (PEP 562)."""
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
