"""`python -m orchestrator.cli`."""

from __future__ import annotations

from orchestrator.cli import app

app()
