"""For machines: one JSON object per line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from orchestrator.clusters import AnyEvent
from orchestrator.core.nodes import NodeFacts
from orchestrator.core.plan import Plan
from orchestrator.core.schedule import Start
from orchestrator.core.step import Outcome
from orchestrator.report.listener import Finished


class JsonListener:
    """One JSON object per line, for machines."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._plan: Plan | None = None

    def _say(self, what: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": what, **fields}) + "\n")
        self._stream.flush()

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None:
        self._plan = plan
        pending = [] if already_published else [step.name for step in plan.pending(committed)]
        self._say(
            "plan", steps=len(plan.steps), pending=pending, build_key=plan.build_key, already_published=already_published,
            warnings=list(plan.warnings), notes=list(plan.notes),
        )  # fmt: skip

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        self._say("nodes", nodes=[node.model_dump(mode="json") for node in nodes], warnings=list(warnings))

    def on_event(self, event: AnyEvent) -> None:
        step = self._plan.step(event.digest).name if self._plan else ""
        self._say(event.type, step=step, **event.model_dump(mode="json", exclude={"type"}))

    def on_retry(self, command: Start) -> None:
        self._say(
            "retry",
            step=command.step.name,
            digest=command.step.digest,
            attempt=command.attempt,
            delay_seconds=command.delay_seconds,
        )

    def on_finish(self, plan: Plan, result: Finished) -> None:
        self._say("finish", ran=sorted(plan.step(digest).name for digest in result.ran))
