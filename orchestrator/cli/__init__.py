"""The command line: decodes options, joins spec, store and cluster, maps errors to exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.cli.commands import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """Import the commands on first access, so that `main` can first make them stoppable (PEP 562)."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator.cli.commands import app

    return app
