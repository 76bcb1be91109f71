"""Decide which waiting step begins on which node, for every cluster. No I/O, clock or threads.

A node is one set of cores, GPUs, memory and scratch, which its pools share. A pool's settings limit what the pool's own steps may
hold of each node, and are themselves limited by the node. A step that asks for more holds all of it, so that it runs alone.

Ray would queue actors too, but not in the plan's order, also on draining nodes, and as many at once as its numbers allow even after
a node ran out of memory. So each actor is pinned to the node that is chosen here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from operator import add, le, sub
from typing import Any

from orchestrator.base.errors import ClusterError
from orchestrator.events import StepFailed
from orchestrator.events.nodes import NodeFacts, unfit
from orchestrator.planning.steps import Cause, Failure, FailureKind, Kind, Resources, Step, Task
from orchestrator.spec.cluster import ClusterSpec, PoolSpec

_SUSPECT_SECONDS = 30.0
"""Time for which other nodes are preferred to one that lost a worker: it may be dead before the cluster knows."""
_UNKNOWN_BYTES = 2**62
_Amounts = tuple[int, int, int, int]
"""The fields of Resources, in their order."""


@dataclass(frozen=True, slots=True)
class Node:
    """A live node as the cluster describes it."""

    node_id: str
    name: str
    capacity: Resources
    labels: Mapping[str, str] = field(default_factory=dict)
    leaves_at: float | None = None
    """End of a draining node: seconds since 1970, infinite when unknown. None: the node stays."""

    def offer(self) -> dict[str, Any]:
        """Return the fields of NodeFacts that the cluster knows without asking the node."""
        return {
            "node": self.name, "node_id": self.node_id, "labels": dict(self.labels), "cpus": self.capacity.cpus,
            "gpus": self.capacity.gpus, "memory_bytes": self.capacity.memory_bytes,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placed:
    """A step that may begin now, with its node and resources."""

    task: Task
    node: Node
    held: Resources
    pool: str = ""
    gpus: tuple[int, ...] = ()
    """Devices of the node that belong to this step only."""


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
        self.running: dict[str, Placed] = {}
        """Steps that hold resources, by digest."""
        self._used: dict[tuple[str, str | None], _Amounts] = defaultdict(lambda: (0, 0, 0, 0))
        """Sum of what steps hold, by node and pool; None: of all pools."""
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
            name, pool = self._pool(step)
            held = dict(zip(Resources.model_fields, self._wanted(step, _share(pool, self._room(node))), strict=True))
            placed = Placed(waiting.task, node, Resources(**held), name, self._free_gpus(step, node))
            self.running[digest] = placed
            self._use(placed, add)
            yield placed

    def end(self, digest: str, now: float, failure: Failure | None = None) -> None:
        """Free the step's resources. A failure counts against the node."""
        if digest not in self.running:
            return
        node_id = self._free(digest).node.node_id
        if failure is None:
            return
        if failure.cause in (Cause.NODE, Cause.WORKER, Cause.DISK, Cause.MEMORY, Cause.STORE):
            self._avoided.setdefault(digest, set()).add(node_id)
        if failure.cause is Cause.NODE:
            self._suspect[node_id] = now + _SUSPECT_SECONDS
        if failure.cause is Cause.MEMORY:
            beside = self._num_running(node_id)
            self._limits[node_id] = max(1, min(beside, self._limits.get(node_id, beside)))

    def put_back(self, digest: str, now: float, *, avoid: bool) -> None:
        """Queue a step again that was placed but did not begin."""
        placed = self._free(digest)
        self.add(placed.task, now)
        if avoid:
            self._avoided.setdefault(digest, set()).add(placed.node.node_id)

    def overdue(self, now: float) -> list[StepFailed]:
        """Remove and fail the steps that no node, even an empty one, could take for schedule_timeout_seconds."""
        found = []
        able: dict[str, bool] = {}
        for digest, waiting in list(self._waiting.items()):
            if waiting.alike not in able:
                able[waiting.alike] = any(True for _ in self._able(waiting.task.step))
            if able[waiting.alike]:
                waiting.since = now
            elif now - waiting.since >= self._spec.schedule_timeout_seconds:
                del self._waiting[digest]
                found.append(unplaced(digest, self._reason(waiting.task.step)))
        return found

    def has_other(self, step: Step, node_id: str) -> bool:
        """Whether another node that stays could take the step."""
        return any(node.node_id != node_id for node in self._able(step))

    def bundles(self) -> list[dict[str, float]]:
        """Return the held and requested resources, one bundle per step: the demand for an autoscaler."""
        steps = [placed.task.step for placed in self.running.values()] + [waiting.task.step for waiting in self._waiting.values()]
        asked = [step.resources for step in steps]
        return [{"CPU": float(each.cpus), **({"GPU": float(each.gpus)} if each.gpus else {})} for each in asked]

    def held_bytes(self, node: Node) -> int:
        """Return the memory that steps hold on a node."""
        return self._used[node.node_id, None][2]

    def _free(self, digest: str) -> Placed:
        placed = self.running.pop(digest)
        self._use(placed, sub)
        return placed

    def _use(self, placed: Placed, change: Callable[[int, int], int]) -> None:
        for pool in (None, placed.pool):
            key = (placed.node.node_id, pool)
            self._used[key] = _each(change, self._used[key], _amounts(placed.held))

    def _num_running(self, node_id: str) -> int:
        return sum(placed.node.node_id == node_id for placed in self.running.values())

    def _able(self, step: Step) -> Iterator[Node]:
        """Yield the nodes that stay and could take the step if they were empty."""
        return (node for group in self._groups(step) for node in group)

    def _groups(self, step: Step) -> Iterator[list[Node]]:
        """Yield able nodes by the pool's label selectors, the preferred ones first."""
        _, pool = self._pool(step)
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
                        node.node_id in avoided, self._suspect.get(node.node_id, now) > now,
                        self._used[node.node_id, None][0] / node.capacity.cpus, self.held_bytes(node), node.name,
                    ),
                )  # fmt: skip
        return None

    def _has_room(self, step: Step, node: Node) -> bool:
        node_id, (name, pool), room = node.node_id, self._pool(step), self._room(node)
        if node_id in self._limits and self._num_running(node_id) >= self._limits[node_id]:
            return False
        share = _share(pool, room)
        wanted = self._wanted(step, share)
        return all(all(map(le, map(add, self._used[node_id, who], wanted), limit)) for who, limit in ((None, room), (name, share)))

    def _free_gpus(self, step: Step, node: Node) -> tuple[int, ...]:
        taken = {gpu for placed in self.running.values() if placed.node.node_id == node.node_id for gpu in placed.gpus}
        return tuple(islice((gpu for gpu in range(node.capacity.gpus) if gpu not in taken), step.resources.gpus))

    def _wanted(self, step: Step, share: _Amounts) -> _Amounts:
        """Return the step's resources on a node: at most its pool's whole share, so that no step waits in vain."""
        cpus, gpus, memory, scratch = _each(min, _amounts(step.resources), share)
        copies = self._remote_store or step.kind not in (Kind.BUILD, Kind.VERIFY, Kind.EXPORT)
        return cpus, gpus, memory, scratch if copies else 0

    def _room(self, node: Node) -> _Amounts:
        """Return the resources that all steps together may hold on a node."""
        facts = self._facts.get(node.node_id)
        cpus, gpus, memory, _ = _amounts(node.capacity)
        return cpus, gpus, memory, (facts.scratch_free_bytes if facts else 0) or _UNKNOWN_BYTES

    def _pool(self, step: Step) -> tuple[str, PoolSpec]:
        name = self._spec.pool_name_for(step.kind.value)
        return ("", PoolSpec()) if name is None else (name, self._spec.pools[name])

    def _reason(self, step: Step) -> str:
        _, pool = self._pool(step)
        asked = [f"{step.resources.cpus} CPU", *([f"{step.resources.gpus} GPU"] if step.resources.gpus else [])]
        labels = f" with labels {' or '.join(str(dict(each)) for each in (pool.labels, *pool.fallback))}" if pool.labels else ""
        have = "; ".join(f"{node.name}: {self._why(step, node, pool)}" for node in self._nodes.values()) or "none is alive"
        waited = f"{self._spec.schedule_timeout_seconds:.0f} s"
        return f"no node could take it for {waited}: it asks for {', '.join(asked)}{labels}; the nodes: {have}"

    def _why(self, step: Step, node: Node, pool: PoolSpec) -> str:
        if not is_of(pool, node.labels):
            return f"labels { ({name: value for name, value in node.labels.items() if name != 'ray.io/node-id'}) }"
        return self._unable(step, node)


def _amounts(resources: Resources) -> _Amounts:
    return resources.cpus, resources.gpus, resources.memory_bytes, resources.scratch_bytes


def _share(pool: PoolSpec, room: _Amounts) -> _Amounts:
    """Return the resources that all steps of a pool together may hold on a node with this room."""
    cpus, gpus, memory, scratch = room
    return _each(min, room, (pool.cpus or cpus, gpus, pool.memory or memory, pool.scratch or scratch))


def _each(function: Callable[[int, int], int], first: _Amounts, second: _Amounts) -> _Amounts:
    cpus, gpus, memory, scratch = map(function, first, second)
    return cpus, gpus, memory, scratch


def unplaced(digest: str, message: str) -> StepFailed:
    """Return the failure of a step that finds no room."""
    failure = Failure(kind=FailureKind.APPLICATION, error=ClusterError.__name__, cause=Cause.PLACE, message=message)
    return StepFailed(digest=digest, failure=failure)


def check_pools(spec: ClusterSpec, nodes: Iterable[Node]) -> None:
    """Check the nodes of a cluster that gains none. Raises ClusterError for a pool without nodes, or whose nodes lack its GPUs."""
    nodes = list(nodes)
    for name, pool in spec.pools.items():
        mine = [node for node in nodes if is_of(pool, node.labels)]
        if not mine:
            raise ClusterError(
                f"no node has the labels of pool {name}: {dict(pool.labels)}",
                "The nodes have: " + "; ".join(f"{node.name} {dict(node.labels)}" for node in nodes) + ".",
            )
        for node in mine:
            if node.capacity.gpus < pool.gpus:
                raise ClusterError(
                    f"node {node.name} has {node.capacity.gpus} GPUs, but pool {name} needs {pool.gpus}",
                    "Correct gpus or labels of the pool, or ask the launcher for GPUs.",
                )


def is_of(pool: PoolSpec, labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` may run steps of a pool: its own labels select the node, or those of a fallback."""
    return any(selects(wanted, labels) for wanted in (pool.labels, *pool.fallback))


def selects(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` meets every condition of `wanted`. A negated condition holds where the label is absent.

    Conditions are those of Ray's label selectors: VALUE, !VALUE, in(A, B), !in(A, B).
    """
    return all(_meets(condition, labels.get(name)) for name, condition in wanted.items())


def _meets(condition: str, value: str | None) -> bool:
    if condition.startswith("!"):
        return not _meets(condition[1:], value)
    if condition.startswith("in(") and condition.endswith(")"):
        return value in [item.strip() for item in condition[3:-1].split(",")]
    return value == condition
