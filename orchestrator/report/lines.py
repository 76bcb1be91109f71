"""What a listener is told, as events of `following`: for views, for stores and, as JSON lines, for machines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from orchestrator.events.builds import BuildEvent, Finished, NodesSeen, Planned, Retrying, Stepped, encode_line
from orchestrator.events.nodes import NodeFacts
from orchestrator.events.steps import AnyEvent
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Outcome
from orchestrator.run.listener import Finished as Result
from orchestrator.run.schedule import Start

Clock = Callable[[], float]
"""Seconds since 1970."""


class EventListener:
    """Passes on what happens as events with their time, and with the attempt that a step's event belongs to."""

    def __init__(self, tell: Callable[[BuildEvent], None], clock: Clock = time.time) -> None:
        self._tell = tell
        self._clock = clock
        self._plan: Plan | None = None
        self._attempts: dict[str, tuple[str, int]] = {}
        """Node and number of each step's attempt, by digest."""

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None:
        self._plan = plan
        pending = [] if already_published else plan.pending(committed)
        release = plan.spec.release
        planned = Planned(
            num_steps=len(plan.steps),
            pending=tuple(step.name for step in pending),
            build_key=plan.build_key,
            already_published=already_published,
            warnings=tuple(plan.warnings),
            notes=tuple(plan.notes),
            estimates=tuple(round(step.estimate.seconds, 3) for step in pending),
            release=f"{release.name}/{release.version}",
            at=self._clock(),
        )
        self._tell(planned)

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        self._tell(NodesSeen(tuple(nodes), tuple(warnings), self._clock()))

    def on_event(self, event: AnyEvent) -> None:
        if event.type == "started":
            self._attempts[event.digest] = (event.node, event.attempt)
        node, attempt = self._attempts.get(event.digest, ("", 0))
        if event.type == "succeeded":
            node = event.outcome.node or node
        elif event.type == "failed":
            node = event.failure.node or node
        name = self._plan.step(event.digest).name if self._plan else event.digest
        self._tell(Stepped(name, event, node, attempt, self._clock()))

    def on_retry(self, command: Start) -> None:
        step = command.step
        self._tell(Retrying(step.name, step.digest, command.attempt, command.delay_seconds, self._clock()))

    def on_finish(self, plan: Plan, result: Result) -> None:
        self._tell(Finished(tuple(sorted(plan.step(digest).name for digest in result.ran)), self._clock()))


class JsonListener(EventListener):
    """One JSON object per line, for machines."""

    def __init__(self, stream: IO[str] | None = None, clock: Clock = time.time) -> None:
        self._stream = stream or sys.stdout
        super().__init__(self._write, clock)

    def _write(self, event: BuildEvent) -> None:
        self._stream.write(encode_line(event) + "\n")
        self._stream.flush()
