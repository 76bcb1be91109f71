"""Which waiting tasks may begin: CPU slots, GPUs and memory of the pools of one machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator.core.spec import ClusterSpec, PoolSpec
from orchestrator.core.step import Resources, Task


def machine_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass
class _Pool:
    spec: PoolSpec
    capacity: Resources
    used: dict[str, Resources] = field(default_factory=dict)

    def admits(self, wanted: Resources) -> bool:
        """Whether there is room. A step that asks for more than the whole pool has may run alone."""
        if not self.used:
            return wanted.gpus <= self.capacity.gpus
        taken = self.used.values()
        return (
            sum(item.cpus for item in taken) + wanted.cpus <= self.capacity.cpus
            and sum(item.gpus for item in taken) + wanted.gpus <= self.capacity.gpus
            and sum(item.memory_bytes for item in taken) + wanted.memory_bytes <= self.capacity.memory_bytes
        )


class Admission:
    """A queue in order of arrival in which a task that fits may pass one that does not."""

    def __init__(self, cluster: ClusterSpec) -> None:
        self._waiting: list[Task] = []
        self._pools = [_Pool(spec, _capacity(spec)) for spec in cluster.pools.values()]

    def add(self, task: Task) -> None:
        self._waiting.append(task)

    def begin(self) -> Iterator[Task]:
        """Take out every task that may begin now; its room is held until `end`."""
        for task in list(self._waiting):
            pool = next((pool for pool in self._pools if task.step.kind.value in pool.spec.steps), None)
            if pool is not None and pool.admits(task.step.resources):
                pool.used[task.step.digest] = task.step.resources
                self._waiting.remove(task)
                yield task

    def end(self, digest: str) -> None:
        for pool in self._pools:
            pool.used.pop(digest, None)

    def clear(self) -> None:
        self._waiting.clear()


def _capacity(spec: PoolSpec) -> Resources:
    cpus, memory = spec.cpus or os.cpu_count() or 1, spec.memory or machine_memory_bytes()
    return Resources(cpus=cpus, gpus=spec.gpus, memory_bytes=memory)
