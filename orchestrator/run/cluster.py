"""Where steps run: the protocol that the driver knows.

Every member passes tests/contracts/cluster_contract.py. A cluster only executes: it never retries, never reorders needs,
and reports each attempt with exactly one final event.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from orchestrator.events.nodes import NodeFacts
from orchestrator.events.steps import AnyEvent
from orchestrator.planning.steps import Task
from orchestrator.stores.hub import HUB_OFFLINE


class Cluster(Protocol):
    """A place that runs tasks."""

    def start(self, task: Task) -> None:
        """Take a task; it begins in a later call of `events`, when there is room for it. Returns at once.

        So of all that wait, what an ended step made ready included, the first in the plan's order takes the room it left.
        """
        ...

    def events(self, timeout_seconds: float | None) -> list[AnyEvent]:
        """What happened since the last call; waits until something does or the time is up (None: as long as it takes)."""
        ...

    def now(self) -> float:
        """Seconds on the cluster's clock, for delays."""
        ...

    def close(self) -> None:
        """Stop what still runs and let go of everything. Idempotent."""
        ...


@runtime_checkable
class Probing(Protocol):
    """What a cluster of other machines can do besides: ask them."""

    def probe(self, paths: Iterable[str]) -> list[NodeFacts]:
        """What every node has, one answer per node that is alive. `paths` are folders and files that steps will read."""
        ...


def worker_environment(threads: int, *, gpu: bool) -> dict[str, str]:
    """Environment variables that every worker of a step gets: threads pinned, GPUs hidden from steps that use none."""
    count = str(threads)
    environment = {
        "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        HUB_OFFLINE: os.environ.get("HF_HUB_OFFLINE", "0"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
    }  # fmt: skip
    return environment if gpu else {**environment, "CUDA_VISIBLE_DEVICES": ""}
