"""Find out why a process ended without a final event: from evidence, never by default.

A process that the kernel killed for memory is retried elsewhere with fewer steps beside it; one that vanished, just elsewhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from orchestrator.planning.steps import Cause, Failure, FailureKind

_TAIL_BYTES = 4000
_KILLED_CODES = (-9, 9, 137)
_COUNTS = (
    "/sys/fs/cgroup{group}/memory.events",
    "/sys/fs/cgroup/memory{group}/memory.oom_control",
    "/sys/fs/cgroup/memory.events",
    "/sys/fs/cgroup/memory/memory.oom_control",
)
"""Files that may count a group's killed processes: cgroup v2, v1, and both as seen inside a container."""


def crash(code: int, node: str, log: IO[bytes], num_oom_kills: int = 0) -> Failure:
    """Return the failure of a step's process that ended without a final event: killed, or crashed in native code."""
    reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    kernel = memory_kills(num_oom_kills) if code in _KILLED_CODES else ""
    if kernel:
        reason = "was killed for memory by the kernel"
    return Failure(
        kind=FailureKind.INFRASTRUCTURE,
        cause=Cause.MEMORY if kernel else Cause.WORKER,
        message=f"the step's process {reason}",
        node=node,
        log_tail=tail(log),
        kernel=kernel,
    )


def tail(log: IO[bytes]) -> str:
    """Return the end of what a process has printed."""
    log.seek(max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
    return log.read().decode(errors="replace")


def memory_kills(count: int) -> str:
    """Return in words that the kernel killed `count` processes beside a step; empty for none."""
    return f"the kernel killed {count} processes of the step's control group for memory meanwhile" if count > 0 else ""


def memory_group(text: str) -> str:
    """Return the memory control group in the text of /proc/PID/cgroup; "" when there is none."""
    lines = [line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2]
    first = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
    unified = [path for number, controllers, path in lines if (number, controllers) == ("0", "")]
    return next(iter([*first, *unified]), "")


def oom_kills(group: str | None = None) -> int:
    """Return how many processes of a control group (default: this process's) the kernel has killed for memory; 0 if unknown."""
    if group is None:
        group = memory_group(Path("/proc/self/cgroup").read_text())
    return next(_counts(group), 0)


def _counts(group: str) -> Iterator[int]:
    for place in _COUNTS:
        try:
            lines = Path(place.format(group=group.rstrip("/"))).read_text().splitlines()
            yield next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        except (OSError, ValueError, StopIteration):
            continue
