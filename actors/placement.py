"""Decide which waiting step begins on which node. No Ray, clock or threads.

Ray would queue actors too, but not in the plan's order, also on draining nodes, and as many at once as its numbers allow even after
a node ran out of memory. So each actor is pinned to the node that is chosen here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.events.nodes import NodeFacts, unfit
from orchestrator.planning.steps import Cause, Failure, Kind, Resources, Step, Task
from orchestrator.run.labels import selects
from orchestrator.spec.cluster import ClusterSpec, PoolSpec

_SUSPECT_SECONDS = 30.0
"""Time for which other nodes are preferred to one that lost a worker: it may be dead before the cluster knows."""


@dataclass(frozen=True, slots=True)
class Node:
    """A live node as the cluster describes it."""

    node_id: str
    name: str
    capacity: Resources
    labels: Mapping[str, str] = field(default_factory=dict)
    leaves_at: float | None = None
    """End of a draining node: seconds since 1970, infinite when unknown. None: the node stays."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A step that may begin now, with its node and resources."""

    task: Task
    node: Node
    held: Resources


@dataclass
class _Waiting:
    task: Task
    alike: str
    """Equal for steps that fit on the same nodes."""
    since: float
    """When the step was added, or could last have been placed on an empty node."""


class Placement:
    """Queue of tasks in their stated order, then by arrival. A step that fits may pass one that does not."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._remote_store = not spec.store.startswith("file:")
        self._nodes: dict[str, Node] = {}
        self._facts: dict[str, NodeFacts] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._held: dict[str, Placed] = {}
        self._avoided: dict[str, set[str]] = {}
        """Nodes where the step failed, by its digest."""
        self._suspect: dict[str, float] = {}
        """End of a node's time as suspect, by node."""
        self._limits: dict[str, int] = {}
        """Largest number of simultaneous steps by node, after a worker there was killed for memory."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, task: Task, now: float) -> None:
        step = task.step
        alike = f"{step.kind} {step.resources} {step.locations} {step.options.get('engine')}"
        last = next(reversed(self._waiting.values()), None)
        self._waiting[step.digest] = _Waiting(task, alike, now)
        if last is not None and task.order < last.task.order:
            self._waiting = dict(sorted(self._waiting.items(), key=lambda item: item[1].task.order))

    def update(self, nodes: Iterable[Node]) -> None:
        """Set the live nodes."""
        self._nodes = {node.node_id: node for node in nodes}

    def learn(self, facts: Iterable[NodeFacts]) -> None:
        """Take in the nodes' reports. A node without a report is assumed to be fit."""
        self._facts.update({node.node_id: node for node in facts})

    def begin(self, now: float) -> Iterator[Placed]:
        """Remove and yield every step that may begin now. Its resources are held until `end`."""
        full: set[str] = set()
        for digest, waiting in list(self._waiting.items()):
            if waiting.alike in full:
                continue
            step = waiting.task.step
            node = self._choose(step, now)
            if node is None:
                full.add(waiting.alike)
                continue
            del self._waiting[digest]
            placed = Placed(waiting.task, node, self._wanted(step, node))
            self._held[digest] = placed
            yield placed

    def end(self, digest: str, now: float, failure: Failure | None = None) -> None:
        """Free the step's resources. A failure counts against the node."""
        placed = self._held.pop(digest, None)
        if placed is None or failure is None:
            return
        node_id = placed.node.node_id
        if failure.cause in (Cause.NODE, Cause.WORKER, Cause.DISK, Cause.MEMORY, Cause.STORE):
            self._avoided.setdefault(digest, set()).add(node_id)
        if failure.cause is Cause.NODE:
            self._suspect[node_id] = now + _SUSPECT_SECONDS
        if failure.cause is Cause.MEMORY:
            beside = sum(other.node.node_id == node_id for other in self._held.values())
            self._limits[node_id] = max(1, min(beside, self._limits.get(node_id, beside)))

    def put_back(self, digest: str, now: float, *, avoid: bool) -> None:
        """Queue a step again that was placed but did not begin."""
        placed = self._held.pop(digest)
        self.add(placed.task, now)
        if avoid:
            self._avoided.setdefault(digest, set()).add(placed.node.node_id)

    def overdue(self, now: float) -> list[tuple[Task, str]]:
        """Remove and return steps that no node, even an empty one, could take for schedule_timeout_seconds, with the reasons."""
        found = []
        able: dict[str, bool] = {}
        for digest, waiting in list(self._waiting.items()):
            if waiting.alike not in able:
                able[waiting.alike] = any(True for _ in self._able(waiting.task.step))
            if able[waiting.alike]:
                waiting.since = now
            elif now - waiting.since >= self._spec.schedule_timeout_seconds:
                del self._waiting[digest]
                found.append((waiting.task, self._reason(waiting.task.step)))
        return found

    def has_other(self, step: Step, node_id: str) -> bool:
        """Whether another node that stays could take the step."""
        return any(node.node_id != node_id for node in self._able(step))

    def bundles(self) -> list[dict[str, float]]:
        """Return the held and requested resources, one bundle per step: the demand for an autoscaler."""
        steps = [placed.task.step for placed in self._held.values()] + [waiting.task.step for waiting in self._waiting.values()]
        return [{"CPU": float(step.resources.cpus), **_gpus(step)} for step in steps]

    def _able(self, step: Step) -> Iterator[Node]:
        """Yield the nodes that stay and could take the step if they were empty."""
        return (node for group in self._groups(step) for node in group)

    def _groups(self, step: Step) -> Iterator[list[Node]]:
        """Yield able nodes by the pool's label selectors, the preferred ones first."""
        pool = self._pool(step)
        for labels in (pool.labels, *pool.fallback):
            yield [node for node in self._nodes.values() if selects(labels, node.labels) and not self._unable(step, node)]

    def _unable(self, step: Step, node: Node) -> str:
        """Return why a node could not take a step even if empty; empty: it could."""
        if node.leaves_at is not None:
            return "is being taken back"
        if node.capacity.cpus < 1:
            return "offers no CPUs"
        if node.capacity.gpus < step.resources.gpus:
            return f"has {node.capacity.gpus} GPUs"
        facts = self._facts.get(node.node_id)
        return unfit(facts, step) if facts is not None else ""

    def _choose(self, step: Step, now: float) -> Node | None:
        """Choose from the first group with room: a node where the step has not failed, not suspect, with the lowest load."""
        avoided = self._avoided.get(step.digest, set())
        for group in self._groups(step):
            room = [node for node in group if self._has_room(step, node)]
            if room:
                return min(
                    room,
                    key=lambda node: (
                        node.node_id in avoided, self._suspect.get(node.node_id, now) > now, self._load(node), node.name,
                    ),
                )  # fmt: skip
        return None

    def _load(self, node: Node) -> float:
        return sum(held.cpus for held in self._on(node)) / node.capacity.cpus

    def _on(self, node: Node) -> list[Resources]:
        return [placed.held for placed in self._held.values() if placed.node.node_id == node.node_id]

    def _has_room(self, step: Step, node: Node) -> bool:
        on, wanted, limit = self._on(node), self._wanted(step, node), self._limit(step, node)
        return (
            len(on) < self._limits.get(node.node_id, len(on) + 1)
            and sum(held.cpus for held in on) + wanted.cpus <= limit.cpus
            and sum(held.gpus for held in on) + wanted.gpus <= limit.gpus
            and sum(held.memory_bytes for held in on) + wanted.memory_bytes <= limit.memory_bytes
            and sum(held.scratch_bytes for held in on) + wanted.scratch_bytes <= limit.scratch_bytes
        )

    def _wanted(self, step: Step, node: Node) -> Resources:
        """Return the step's resources on a node: at most the whole node, so that no step waits in vain."""
        asked, limit = step.resources, self._limit(step, node)
        copies = self._remote_store or step.kind not in (Kind.BUILD, Kind.VERIFY)
        return Resources(
            cpus=min(asked.cpus, limit.cpus),
            gpus=asked.gpus,
            memory_bytes=min(asked.memory_bytes, limit.memory_bytes),
            scratch_bytes=min(asked.scratch_bytes, limit.scratch_bytes) if copies else 0,
        )

    def _limit(self, step: Step, node: Node) -> Resources:
        """Return the resources that all steps of this kind together may hold on a node."""
        pool, facts = self._pool(step), self._facts.get(node.node_id)
        free = facts.scratch_free_bytes if facts is not None and facts.scratch_free_bytes else 2**62
        return Resources(
            cpus=min(pool.cpus or node.capacity.cpus, node.capacity.cpus),
            gpus=node.capacity.gpus,
            memory_bytes=min(pool.memory or node.capacity.memory_bytes, node.capacity.memory_bytes),
            scratch_bytes=min(pool.scratch or free, free),
        )

    def _pool(self, step: Step) -> PoolSpec:
        return self._spec.pool_for(step.kind.value) or PoolSpec()

    def _reason(self, step: Step) -> str:
        pool = self._pool(step)
        asked = [f"{step.resources.cpus} CPU", *([f"{step.resources.gpus} GPU"] if step.resources.gpus else [])]
        labels = f" with labels {' or '.join(str(dict(each)) for each in (pool.labels, *pool.fallback))}" if pool.labels else ""
        have = "; ".join(f"{node.name}: {self._why(step, node, pool)}" for node in self._nodes.values()) or "none is alive"
        waited = f"{self._spec.schedule_timeout_seconds:.0f} s"
        return f"no node could take it for {waited}: it asks for {', '.join(asked)}{labels}; the nodes: {have}"

    def _why(self, step: Step, node: Node, pool: PoolSpec) -> str:
        if not any(selects(labels, node.labels) for labels in (pool.labels, *pool.fallback)):
            return f"labels { ({name: value for name, value in node.labels.items() if name != 'ray.io/node-id'}) }"
        return self._unable(step, node)


def _gpus(step: Step) -> dict[str, float]:
    return {"GPU": float(step.resources.gpus)} if step.resources.gpus else {}
