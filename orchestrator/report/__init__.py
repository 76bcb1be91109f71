"""Reports of a build, while it runs and when it ends: listeners for people and for machines, and tables."""

from __future__ import annotations

from orchestrator.report.console import ConsoleListener
from orchestrator.report.lines import EventListener, JsonListener
from orchestrator.report.tables import (
    counted,
    describe_plan,
    format_bytes,
    format_count,
    format_seconds,
    plan_table,
    stage_table,
    step_table,
)
from orchestrator.report.transfer import TransferView
from orchestrator.report.view import LiveView
from orchestrator.run.listener import Finished, Listener, Listeners, SilentListener

__all__ = [
    "ConsoleListener", "EventListener", "Finished", "JsonListener", "Listener", "Listeners", "LiveView", "SilentListener",
    "TransferView",
    "counted", "describe_plan", "format_bytes", "format_count", "format_seconds", "plan_table", "stage_table", "step_table",
]  # fmt: skip
