"""The protocol of clusters, which run the driver's steps.

Every implementation passes tests/contracts/cluster_contract.py. A cluster only executes: it never retries, never reorders needs,
and reports each attempt with exactly one final event.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from orchestrator.events import StepEvent
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.steps import Task
from orchestrator.stores.hub import HUB_OFFLINE


class Cluster(Protocol):
    """A place that runs tasks."""

    def start(self, task: Task) -> None:
        """Queue a task and return at once; it begins in a later call of `events`, when there is room.

        Among all waiting tasks, also those that an ended step made ready, the first in the plan's order gets the room.
        """
        ...

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        """Wait for events and return those since the last call; empty after `timeout_seconds` (None: no limit)."""
        ...

    def now(self) -> float:
        """Return seconds on the cluster's clock, for delays."""
        ...

    def close(self) -> None:
        """Stop running tasks and release all resources. Idempotent."""
        ...


@runtime_checkable
class Probing(Protocol):
    """A cluster whose nodes can be probed."""

    def probe(self, paths: Iterable[str]) -> list[NodeFacts]:
        """Return the facts of every live node. `paths`: folders and files that steps will read, to look for there."""
        ...


def machine_memory_bytes() -> int:
    """Return the physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine_cpus() -> int:
    """Return the number of cores that this process may use: a launcher may have bound it to some of them."""
    return len(os.sched_getaffinity(0))


def worker_environment(threads: int, *, gpu: bool) -> dict[str, str]:
    """Return the environment variables of every worker of a step: pinned threads, no GPUs for steps that use none."""
    count = str(threads)
    environment = {
        "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        HUB_OFFLINE: os.environ.get("HF_HUB_OFFLINE", "0"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    return environment if gpu else {**environment, "CUDA_VISIBLE_DEVICES": ""}
