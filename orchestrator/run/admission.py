"""Decide which waiting tasks may begin on which node, by CPU slots, GPUs and memory of the nodes of every pool."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.base.errors import ClusterError
from orchestrator.events.nodes import NodeFacts, unfit
from orchestrator.planning.steps import Resources, Step, Task
from orchestrator.run.labels import selects
from orchestrator.spec.cluster import ClusterSpec, PoolSpec


def machine_memory_bytes() -> int:
    """Return the physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine_cpus() -> int:
    """Return the number of cores that this process may use: a launcher may have bound it to some of them."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Node:
    """A machine, or a share of one, that runs steps."""

    name: str
    capacity: Resources
    labels: Mapping[str, str] = field(default_factory=dict)
    choice: int = 0
    """Index of the pool's labels that selected the node: 0 for the pool's own, then its fallbacks in order."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A task that may begin now, with its node."""

    task: Task
    pool: str
    node: str
    gpus: tuple[int, ...]
    """Devices of the node that belong to this step only."""


@dataclass
class _Share:
    """Share of a node that a pool may use. Pools on one node do not see each other's cores and memory, but never share a GPU."""

    pool: str
    spec: PoolSpec
    node: Node
    capacity: Resources
    used: dict[str, Resources] = field(default_factory=dict)

    def admits(self, wanted: Resources) -> bool:
        """Whether the step has room. A step larger than the whole share may run alone."""
        if not self.used:
            return wanted.gpus <= self.capacity.gpus
        taken = self.used.values()
        return (
            sum(item.cpus for item in taken) + wanted.cpus <= self.capacity.cpus
            and sum(item.gpus for item in taken) + wanted.gpus <= self.capacity.gpus
            and sum(item.memory_bytes for item in taken) + wanted.memory_bytes <= self.capacity.memory_bytes
        )

    @property
    def memory_bytes(self) -> int:
        return sum(item.memory_bytes for item in self.used.values())


class Admission:
    """Queue of tasks in their stated order, then by arrival. A task that fits may pass one that does not."""

    def __init__(self, cluster: ClusterSpec, nodes: Mapping[str, Sequence[Node]] | None = None) -> None:
        """`nodes` by pool; without them, each pool is a share of this machine. Raises ClusterError when a node lacks GPUs."""
        self._cluster = cluster
        self._waiting: list[Task] = []
        self._devices: dict[str, dict[int, str]] = {}
        """Digest of the step that holds a device, by node and device."""
        self._facts: dict[str, NodeFacts] = {}
        self._shares: list[_Share] = []
        for name, spec in cluster.pools.items():
            mine = nodes[name] if nodes is not None else [_here(spec)]
            for node in mine:
                if node.capacity.gpus < spec.gpus:
                    raise ClusterError(
                        f"node {node.name} has {node.capacity.gpus} GPUs, but pool {name} needs {spec.gpus}",
                        "Correct gpus or labels of the pool, or ask the launcher for GPUs.",
                    )
            self._shares.extend(_Share(name, spec, node, _capacity(spec, node)) for node in mine)

    def add(self, task: Task) -> None:
        bisect.insort(self._waiting, task, key=lambda waiting: waiting.order)

    def learn(self, facts: Iterable[NodeFacts]) -> None:
        """Take in the nodes' reports: steps avoid a node that cannot run them, if another node can."""
        self._facts = {node.node: node for node in facts}

    def begin(self) -> Iterator[Placement]:
        """Remove and yield every task that may begin now; its room is held until `end`.

        Among nodes with room, the pool's own come before its fallbacks, then those with most room.
        """
        for task in list(self._waiting):
            step = task.step
            room = [share for share in self._candidates(step) if share.admits(step.resources)]
            if not room:
                continue
            share = min(room, key=lambda share: (share.node.choice, len(share.used) / share.capacity.cpus, share.memory_bytes))
            share.used[step.digest] = step.resources
            self._waiting.remove(task)
            yield Placement(task, share.pool, share.node.name, self._take_devices(share, task))

    def _candidates(self, step: Step) -> list[_Share]:
        pool = self._cluster.pool_name_for(step.kind.value)
        mine = [share for share in self._shares if share.pool == pool]
        fit = [share for share in mine if share.node.name not in self._facts or not unfit(self._facts[share.node.name], step)]
        return fit or mine

    def end(self, digest: str) -> None:
        for share in self._shares:
            share.used.pop(digest, None)
        for held in self._devices.values():
            for device in [device for device, holder in held.items() if holder == digest]:
                del held[device]

    def clear(self) -> None:
        self._waiting.clear()

    def memory_bytes(self) -> dict[tuple[str, str], int]:
        """Return the memory reserved now, by pool and node."""
        return {(share.pool, share.node.name): share.memory_bytes for share in self._shares}

    def slots(self) -> dict[str, int]:
        """Return the CPU slots of all nodes, by pool."""
        found: dict[str, int] = {}
        for share in self._shares:
            found[share.pool] = found.get(share.pool, 0) + share.capacity.cpus
        return found

    def _take_devices(self, share: _Share, task: Task) -> tuple[int, ...]:
        held = self._devices.setdefault(share.node.name, {})
        taken: list[int] = []
        device = 0
        while len(taken) < task.step.resources.gpus:
            if device not in held:
                held[device] = task.step.digest
                taken.append(device)
            device += 1
        return tuple(taken)


def by_pool(cluster: ClusterSpec, nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """Return the nodes that each pool's labels or fallbacks select. Raises ClusterError for a pool without nodes."""
    found: dict[str, list[Node]] = {}
    for name, spec in cluster.pools.items():
        choices = [spec.labels, *spec.fallback]
        found[name] = [
            replace(node, choice=choice)
            for node in nodes
            if (choice := next((i for i, labels in enumerate(choices) if selects(labels, node.labels)), -1)) >= 0
        ]
        if not found[name]:
            raise ClusterError(
                f"no node has the labels of pool {name}: {dict(spec.labels)}",
                "The nodes have: " + "; ".join(f"{node.name} {dict(node.labels)}" for node in nodes) + ".",
            )
    return found


def _here(spec: PoolSpec) -> Node:
    return Node("", Resources(cpus=machine_cpus(), gpus=spec.gpus, memory_bytes=machine_memory_bytes()))


def _capacity(spec: PoolSpec, node: Node) -> Resources:
    return Resources(
        cpus=spec.cpus or node.capacity.cpus,
        gpus=spec.gpus,
        memory_bytes=spec.memory or node.capacity.memory_bytes,
    )
