"""A cluster that runs nothing: steps take simulated time at given rates, and failures follow a script.

The real schedule and the real driver run on it, so order, retries and makespan are theirs. A step reads from the store, computes,
and writes to the store. Transfers share links; each computation has its CPU slot to itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestrator.clusters.links import Links
from orchestrator.events import StepEvent, StepFailed, StepStarted, StepSucceeded
from orchestrator.planning.steps import Failure, Kind, Outcome, Resources, Step, Task
from orchestrator.scheduling.cluster import machine_cpus, machine_memory_bytes
from orchestrator.scheduling.placement import Node, Placed, Placement
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.rates import RatesSpec

STORE_READ, STORE_WRITE = "store/read", "store/write"
_POOL = "orchestrator/pool"
"""Label of every node: the pool whose nodes it is one of. Fallbacks select by the labels of other pools, as in a real cluster."""


def node_links(node: str) -> tuple[str, str, str]:
    """Return the names of a node's links: network in, network out, disk."""
    return f"{node}/in", f"{node}/out", f"{node}/disk"


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt of a step."""

    start: float
    end: float
    name: str
    kind: Kind
    digest: str
    attempt: int
    pool: str
    """The node's pool."""
    node: str
    failed: bool


@dataclass
class _Attempt:
    placed: Placed
    start: float
    phases: Iterator[None]


class SimulatedCluster:
    """See Cluster. `failures`: failure of an attempt by (step name, attempt), raised when the attempt would begin to write.

    Without `rates`, a step takes its estimated seconds and transfers take no time. CPU slots and memory that the pools leave open
    are those of this machine.
    """

    def __init__(
        self, spec: ClusterSpec, failures: Mapping[tuple[str, int], Failure] | None = None, rates: RatesSpec | None = None
    ) -> None:
        self._rates = rates
        self.nodes = {name: _nodes(spec, name) for name in spec.pools}
        pools = {name: pool.model_copy(update={"labels": {_POOL: name}}) for name, pool in spec.pools.items()}
        self._placement = Placement(spec.model_copy(update={"pools": pools}))
        self._placement.update(node for nodes in self.nodes.values() for node in nodes)
        self.links = Links(_limits(self.nodes, rates or RatesSpec()))
        self._failures = dict(failures or {})
        self._attempts: dict[str, _Attempt] = {}
        self._computing: list[tuple[float, int, str]] = []
        self._events: list[StepEvent] = []
        self._clock = 0.0
        self._sequence = 0
        self.spans: list[Span] = []
        """Every attempt, in order of its end."""
        self.peak_memory_bytes: dict[str, int] = {}
        """Largest memory that steps reserved on one node, by pool."""

    def start(self, task: Task) -> None:
        self._placement.add(task, self._clock)

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        limit = math.inf if timeout_seconds is None else self._clock + timeout_seconds
        self._begin()
        while not self._events and self._advance(limit):
            pass
        found, self._events = self._events, []
        return found

    def now(self) -> float:
        return self._clock

    def close(self) -> None:
        self._placement.update([])  # nothing begins without nodes
        self._attempts.clear()
        self._computing.clear()

    def _begin(self) -> None:
        for placed in self._placement.begin(self._clock):
            task, pool = placed.task, placed.node.labels[_POOL]
            self._events.append(StepStarted(digest=task.step.digest, node=placed.node.name, attempt=task.attempt))
            attempt = _Attempt(placed, self._clock, self._phases(placed))
            self._attempts[task.step.digest] = attempt
            self.peak_memory_bytes[pool] = max(self.peak_memory_bytes.get(pool, 0), self._placement.held_bytes(placed.node))
            self._next(task.step.digest)

    def _phases(self, placed: Placed) -> Iterator[None]:
        """Run an attempt: each turn begins a phase, and the next turn comes when the phase is over."""
        step, digest = placed.task.step, placed.task.step.digest
        inward, outward, disk = node_links(placed.node.name)
        if self._rates is not None and step.estimate.read_bytes:
            self.links.begin(digest, (STORE_READ, inward, disk), step.estimate.read_bytes)
            yield
        self._sequence += 1
        heapq.heappush(
            self._computing, (self._clock + self._compute_seconds(step, placed.node.labels[_POOL]), self._sequence, digest)
        )
        yield
        failed = (step.name, placed.task.attempt) in self._failures
        if self._rates is not None and step.estimate.write_bytes and not failed:
            self.links.begin(digest, (disk, outward, STORE_WRITE), step.estimate.write_bytes)
            yield

    def _compute_seconds(self, step: Step, pool: str) -> float:
        if self._rates is None:
            return step.estimate.seconds
        return self._rates.compute_seconds(step.kind.value, step.estimate.work_bytes, pool)

    def _next(self, digest: str) -> None:
        try:
            next(self._attempts[digest].phases)
        except StopIteration:
            self._end(self._attempts.pop(digest))

    def _advance(self, limit: float) -> bool:
        """Jump to the next end of a phase, or to `limit`. Returns whether more may happen before `limit`."""
        transfer = self.links.next_end()
        compute = self._computing[0][0] if self._computing else math.inf
        at = min(self._clock + transfer, compute)
        if at > limit or at == math.inf:
            if limit != math.inf:
                self.links.advance(limit - self._clock)
                self._clock = limit
            return False
        ended = self.links.advance(transfer if self._clock + transfer <= compute else compute - self._clock)
        self._clock = at
        while self._computing and self._computing[0][0] <= at:
            ended.append(heapq.heappop(self._computing)[2])
        for digest in ended:
            self._next(digest)
        return True

    def _end(self, attempt: _Attempt) -> None:
        placed, task = attempt.placed, attempt.placed.task
        step = task.step
        failure = self._failures.get((step.name, task.attempt))
        span = Span(
            attempt.start, self._clock, step.name, step.kind, step.digest, task.attempt, placed.node.labels[_POOL],
            placed.node.name, failed=failure is not None,
        )  # fmt: skip
        self.spans.append(span)
        self._placement.end(step.digest, self._clock, failure)
        if failure is not None:
            self._events.append(StepFailed(digest=step.digest, failure=failure))
            return
        outcome = Outcome(
            digest=step.digest, name=step.name, kind=step.kind, outputs=(), node=placed.node.name, seconds=span.end - span.start
        )
        self._events.append(StepSucceeded(digest=step.digest, outcome=outcome))


def _nodes(spec: ClusterSpec, pool: str) -> list[Node]:
    found = spec.pools[pool]
    capacity = Resources(cpus=found.cpus or machine_cpus(), gpus=found.gpus, memory_bytes=found.memory or machine_memory_bytes())
    names = [f"{pool}/{number}" for number in range(found.nodes)]
    return [Node(name, name, capacity, {**found.labels, _POOL: pool}) for name in names]


def _limits(nodes: Mapping[str, list[Node]], rates: RatesSpec) -> dict[str, float | None]:
    limits: dict[str, float | None] = {STORE_READ: rates.store_read, STORE_WRITE: rates.store_write}
    for pool, members in nodes.items():
        for node in members:
            inward, outward, disk = node_links(node.name)
            limits |= {inward: rates.pool(pool).network, outward: rates.pool(pool).network, disk: rates.pool(pool).disk}
    return limits
