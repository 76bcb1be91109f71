"""The actor processes of a build: started for a step on a node, kept for the next step of its kind there, ended when unwanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from actors.step_actor import ACTORS, KEPT_BYTES, StepActor
from orchestrator.planning.steps import Resources
from orchestrator.scheduling.cluster import worker_environment
from orchestrator.scheduling.placement import Node, Placed

_SLACK_BYTES = 2**28
"""Memory by which a worker may fall short of a step's estimate: a new process costs more than the estimate is worth."""
_IDLE_SECONDS = 5.0
"""Time for which an idle process keeps its share of the node."""


@dataclass(eq=False)
class Worker:
    """An actor and its share of the node in Ray's accounting."""

    actor: Any
    kind: type[StepActor]
    node: Node
    held: Resources
    idle_since: float | None = None

    def fits(self, placed: Placed) -> bool:
        """Whether the worker may run the step instead of a new process, without holding much that others could use."""
        mine, wanted, node = self.held, placed.held, placed.node
        share = node.capacity.memory_bytes * wanted.cpus // max(1, node.capacity.cpus)
        return (
            self.kind.runs(placed.task.step.kind)
            and self.node.node_id == node.node_id
            and (mine.cpus, mine.gpus) == (wanted.cpus, wanted.gpus)
            and wanted.memory_bytes - _SLACK_BYTES <= mine.memory_bytes <= max(2 * wanted.memory_bytes, share)
        )


class Workers:
    """All workers of a build. None has Ray's restarts or retries."""

    def __init__(self, threads_per_step: int) -> None:
        self._threads = threads_per_step
        self._all: list[Worker] = []

    def take(self, placed: Placed) -> Worker:
        """Return a worker for the step: an idle one, or a new one that begins once Ray has started it."""
        for worker in self._idle():
            if worker.fits(placed):
                worker.idle_since = None
                return worker
        self._make_room(placed)
        kind = ACTORS[placed.task.step.kind]
        worker = Worker(self._actor(kind, placed), kind, placed.node, placed.held)
        self._all.append(worker)
        return worker

    def give_back(self, worker: Worker, resting_bytes: int, now: float) -> None:
        """Take back a worker whose step has succeeded."""
        if resting_bytes > KEPT_BYTES or worker.held.gpus:
            self.end(worker)
        else:
            worker.idle_since = now

    def end(self, worker: Worker) -> None:
        ray.kill(worker.actor, no_restart=True)
        self._all.remove(worker)

    def sweep(self, now: float, gone: set[str]) -> None:
        """End workers that have idled too long, or idle on nodes of `gone`."""
        for worker in list(self._idle()):
            if worker.node.node_id in gone or (worker.idle_since is not None and now - worker.idle_since > _IDLE_SECONDS):
                self.end(worker)

    def close(self) -> None:
        for worker in list(self._all):
            self.end(worker)

    def _idle(self) -> Iterator[Worker]:
        return (worker for worker in self._all if worker.idle_since is not None)

    def _make_room(self, placed: Placed) -> None:
        """End idle workers of the node, the longest idle first, until the step fits beside the others in Ray's accounting."""
        for worker in sorted(self._idle(), key=lambda worker: worker.idle_since or 0.0):
            if self._fits_beside(placed):
                return
            if worker.node.node_id == placed.node.node_id:
                self.end(worker)

    def _fits_beside(self, placed: Placed) -> bool:
        there = [worker.held for worker in self._all if worker.node.node_id == placed.node.node_id] + [placed.held]
        limit = placed.node.capacity
        return (
            sum(held.cpus for held in there) <= limit.cpus
            and sum(held.gpus for held in there) <= limit.gpus
            and sum(held.memory_bytes for held in there) <= limit.memory_bytes
        )

    def _actor(self, kind: type[StepActor], placed: Placed) -> Any:
        gpus = placed.held.gpus
        options: dict[str, Any] = {
            "num_cpus": placed.held.cpus,
            "num_gpus": gpus,
            "memory": placed.held.memory_bytes,
            "label_selector": {"ray.io/node-id": placed.node.node_id},
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        return ray.remote(kind).options(**options).remote(worker_environment(self._threads, gpu=gpus > 0))
