"""What a node still knows of a worker that died there: the end of its stderr, and the kernel's word if it was killed for memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_TAIL_BYTES = 4000
_KERNEL_WORDS = re.compile(r"Out of memory|out of memory|oom-kill|oom_reaper|Killed process")
_RECORD_BYTES = 8192


class WorkerFacts(BaseModel):
    """What a worker says of itself before its step."""

    model_config = ConfigDict(frozen=True)

    node_id: str
    process_id: int
    log: str
    """Path of its stderr; empty when it is no file."""
    oom_kills: int
    """Of its control group so far."""
    boot_seconds: float
    """On the node's clock since boot."""


class Evidence(BaseModel):
    """What was found."""

    model_config = ConfigDict(frozen=True)

    worker_log: str = ""
    kernel: str = ""


def facts_here(node_id: str) -> WorkerFacts:
    """Of this process."""
    target = str(Path("/proc/self/fd/2").readlink())
    return WorkerFacts(
        node_id=node_id,
        process_id=os.getpid(),
        log=target if Path(target).is_file() else "",
        oom_kills=_oom_kills(),
        boot_seconds=time.clock_gettime(time.CLOCK_BOOTTIME),
    )


def examine(facts: WorkerFacts) -> Evidence:
    """Look for traces of a worker on the node where it ran."""
    kernel = "\n".join(kernel_lines(_kernel_records(), facts.boot_seconds)[-5:])
    kills = _oom_kills()
    if not kernel and kills > facts.oom_kills:
        kernel = f"memory.events: oom_kill {facts.oom_kills} -> {kills}"
    return Evidence(worker_log=_tail(facts.log), kernel=kernel)


def kernel_lines(records: Iterable[str], since_seconds: float) -> list[str]:
    """Lines on memory among the kernel's records (priority,sequence,microseconds,...;text) after a time since boot."""
    found = []
    for record in records:
        head, _, text = record.partition(";")
        parts = head.split(",")
        late = len(parts) > 2 and parts[2].isdigit() and int(parts[2]) / 1e6 >= since_seconds
        if late and _KERNEL_WORDS.search(text):
            found.append(text.splitlines()[0])
    return found


def _kernel_records() -> list[str]:
    """What /dev/kmsg holds; nothing where it may not be read."""
    records: list[str] = []
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return records
    try:
        while True:
            records.append(os.read(handle, _RECORD_BYTES).decode(errors="replace"))
    except OSError:  # the end
        return records
    finally:
        os.close(handle)


def _oom_kills() -> int:
    """Processes of this control group that the kernel killed; 0 where it does not say."""
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return log.read().decode(errors="replace")
    except OSError:
        return ""
