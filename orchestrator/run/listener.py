"""Who is told of what a build does, in order: the protocol, one that says nothing, and one that tells several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from orchestrator.events.nodes import NodeFacts
from orchestrator.events.steps import AnyEvent
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Outcome
from orchestrator.run.schedule import Start


class Finished(Protocol):
    """What a listener reads of a driver's Result."""

    @property
    def outcomes(self) -> Mapping[str, Outcome]: ...

    @property
    def ran(self) -> frozenset[str]: ...


class Listener(Protocol):
    """Told of everything that happens, in order."""

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None: ...

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        """What the nodes have, before the first step; a cluster that is this machine alone says nothing."""
        ...

    def on_event(self, event: AnyEvent) -> None: ...

    def on_retry(self, command: Start) -> None: ...

    def on_finish(self, plan: Plan, result: Finished) -> None: ...


class SilentListener:
    """Says nothing."""

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None:
        pass

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        pass

    def on_event(self, event: AnyEvent) -> None:
        pass

    def on_retry(self, command: Start) -> None:
        pass

    def on_finish(self, plan: Plan, result: Finished) -> None:
        pass


class Listeners:
    """Tells several, in their order."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def on_plan(self, plan: Plan, committed: Mapping[str, Outcome], *, already_published: bool) -> None:
        for listener in self._listeners:
            listener.on_plan(plan, committed, already_published=already_published)

    def on_nodes(self, nodes: Sequence[NodeFacts], warnings: Sequence[str]) -> None:
        for listener in self._listeners:
            listener.on_nodes(nodes, warnings)

    def on_event(self, event: AnyEvent) -> None:
        for listener in self._listeners:
            listener.on_event(event)

    def on_retry(self, command: Start) -> None:
        for listener in self._listeners:
            listener.on_retry(command)

    def on_finish(self, plan: Plan, result: Finished) -> None:
        for listener in self._listeners:
            listener.on_finish(plan, result)
