"""The command line: decodes, joins spec, store and cluster, maps errors to exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.cli.commands import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """Import the commands when they are asked for: `main` first sees to it that they can be stopped (PEP 562)."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator.cli.commands import app

    return app
