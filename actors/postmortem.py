"""Evidence about a dead worker on its node: the end of its stderr, and the memory kills of its control group."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from orchestrator.work.lost import memory_group, memory_kills, oom_kills, tail


class WorkerFacts(BaseModel):
    """A worker's facts, reported before its step."""

    model_config = ConfigDict(frozen=True)

    node_id: str
    group: str
    """Path of its memory control group; "/" in a container that sees no further."""
    log: str
    """Path of its stderr; empty when stderr is no file."""
    oom_kills: int
    """Processes of its control group that were killed for memory so far."""


class Evidence(BaseModel):
    """Evidence found on the node."""

    model_config = ConfigDict(frozen=True)

    worker_log: str = ""
    kernel: str = ""
    """Count of processes that the kernel killed for memory; empty: it killed none."""


def facts_here(node_id: str) -> WorkerFacts:
    """Return the facts of this process."""
    target = str(Path("/proc/self/fd/2").readlink())
    group = memory_group(Path("/proc/self/cgroup").read_text())
    return WorkerFacts(node_id=node_id, group=group, log=target if Path(target).is_file() else "", oom_kills=oom_kills(group))


def examine(facts: WorkerFacts) -> Evidence:
    """Look for evidence about a worker on the node where it ran."""
    worker_log = ""
    with contextlib.suppress(OSError), open(facts.log, "rb") as log:
        worker_log = tail(log)
    return Evidence(worker_log=worker_log, kernel=memory_kills(oom_kills(facts.group) - facts.oom_kills))
