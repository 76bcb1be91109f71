"""Evidence about a dead worker on its node: the end of its stderr, and the kernel's records if it was killed for memory.

The kernel's log covers the whole machine and names processes by the machine's ids. A worker in a container has another id, and
unrelated processes are killed beside it. So a worker outside of containers is matched by id, one inside by its control group.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from orchestrator.work.lost import memory_group, oom_kills

_TAIL_BYTES = 4000
_RECORD_BYTES = 8192
_FIRST_PID_SPACE = "pid:[4026531836]"
"""Id of the machine's own pid namespace, fixed in the kernel."""
_VICTIM = re.compile(r"oom-kill:.*task_memcg=(?P<group>[^,]*),.*\bpid=(?P<id>\d+)")
_KILLED = re.compile(r"(?:Killed|reaped) process (?P<id>\d+)")
_RECENT_SECONDS = 60.0
"""Kernel records older than this are no evidence about a worker that has just died."""


class WorkerFacts(BaseModel):
    """A worker's facts, reported before its step."""

    model_config = ConfigDict(frozen=True)

    node_id: str
    process_id: int
    contained: bool
    """True: its process id is not the one in the kernel's log."""
    group: str
    """Path of its memory control group; "/" in a container that sees no further."""
    log: str
    """Path of its stderr; empty when stderr is no file."""
    oom_kills: int
    """Processes of its control group that were killed for memory so far."""
    boot_seconds: float
    """Seconds since the node's boot."""

    def was(self, process_id: int, group: str) -> bool:
        """Whether a process that the kernel killed may have been this worker."""
        if not self.contained:
            return process_id == self.process_id
        return group == self.group


class Evidence(BaseModel):
    """Evidence found on the node."""

    model_config = ConfigDict(frozen=True)

    worker_log: str = ""
    kernel: str = ""


def facts_here(node_id: str) -> WorkerFacts:
    """Return the facts of this process."""
    target = str(Path("/proc/self/fd/2").readlink())
    group = memory_group(Path("/proc/self/cgroup").read_text())
    return WorkerFacts(
        node_id=node_id,
        process_id=os.getpid(),
        contained=str(Path("/proc/self/ns/pid").readlink()) != _FIRST_PID_SPACE,
        group=group,
        log=target if Path(target).is_file() else "",
        oom_kills=oom_kills(group),
        boot_seconds=_boot_seconds(),
    )


def examine(facts: WorkerFacts) -> Evidence:
    """Look for traces of a worker on its node."""
    kernel = "\n".join(kernel_lines(_kernel_records(), facts, _boot_seconds()))
    kills = oom_kills(facts.group)
    if not kernel and kills > facts.oom_kills:
        kernel = f"the kernel's count of processes killed for memory in this control group: {facts.oom_kills} -> {kills}"
    return Evidence(worker_log=_tail(facts.log), kernel=kernel)


def kernel_lines(records: Iterable[str], facts: WorkerFacts, now_seconds: float) -> list[str]:
    """Return the kernel's records (priority,sequence,microseconds,...;text) about the end of a worker; times since boot."""
    since = max(facts.boot_seconds, now_seconds - _RECENT_SECONDS)
    texts = [text for seconds, text in map(_parted, records) if seconds >= since]
    victims = [(match["id"], match["group"]) for match in map(_VICTIM.search, texts) if match]
    mine = {victim for victim, group in victims if facts.was(int(victim), group)}
    return [text for text in texts if any(match and match["id"] in mine for match in (_VICTIM.search(text), _KILLED.search(text)))]


def _parted(record: str) -> tuple[float, str]:
    """Split a record into seconds since boot and its first line."""
    head, _, text = record.partition(";")
    parts = head.split(",")
    seconds = int(parts[2]) / 1e6 if len(parts) > 2 and parts[2].isdigit() else -1.0
    return seconds, text.partition("\n")[0]


def _kernel_records() -> list[str]:
    """Return the records of /dev/kmsg; empty where it may not be read."""
    records: list[str] = []
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return records
    try:
        while True:
            try:
                records.append(os.read(handle, _RECORD_BYTES).decode(errors="replace"))
            except BrokenPipeError:  # this record was overwritten; the next one can be read
                continue
    except OSError:  # no more records
        return records
    finally:
        os.close(handle)


def _boot_seconds() -> float:
    """Return the seconds since boot, on the clock of the kernel's records."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return log.read().decode(errors="replace")
    except OSError:
        return ""
