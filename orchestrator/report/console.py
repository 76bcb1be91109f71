"""For people at a terminal: the view while steps run, one table of all steps at the end."""

from __future__ import annotations

import time

from rich.console import Console

from orchestrator.planning.plan import Plan
from orchestrator.report.lines import Clock, EventListener
from orchestrator.report.tables import step_table
from orchestrator.report.view import LiveView
from orchestrator.run.listener import Finished


class ConsoleListener(EventListener):
    """Bars while steps run, and the table."""

    def __init__(self, console: Console, clock: Clock = time.time) -> None:
        self._console = console
        self._view = LiveView(console, table=False)
        super().__init__(self._view.on, clock)

    def on_finish(self, plan: Plan, result: Finished) -> None:
        super().on_finish(plan, result)
        self._console.print(step_table(plan, result))
