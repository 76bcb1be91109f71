"""Reports of a build, while it runs and when it ends: listeners for people and for machines, and tables."""

from __future__ import annotations

from orchestrator.report.tables import (
    describe_plan,
    experts_lines,
    format_bytes,
    format_count,
    format_seconds,
    plan_table,
    stage_table,
    step_table,
)
from orchestrator.report.transfer import TransferView
from orchestrator.report.view import LiveView

__all__ = [
    "LiveView", "TransferView",
    "describe_plan", "experts_lines", "format_bytes", "format_count", "format_seconds", "plan_table", "stage_table", "step_table",
]  # fmt: skip
