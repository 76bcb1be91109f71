"""What a node still knows of a worker that died there: the end of its stderr, and the kernel's word if it was killed for memory.

The kernel's log is the whole machine's, and names processes by their ids there: a worker in a container has another id, and other
people's processes are killed beside it. So a worker outside of any container is known by its id, one inside by its control group.
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
"""Of the machine itself: its number is fixed in the kernel."""
_VICTIM = re.compile(r"oom-kill:.*task_memcg=(?P<group>[^,]*),.*\bpid=(?P<id>\d+)")
_KILLED = re.compile(r"(?:Killed|reaped) process (?P<id>\d+)")
_RECENT_SECONDS = 60.0
"""Who has just died was not killed before that."""


class WorkerFacts(BaseModel):
    """What a worker says of itself before its step."""

    model_config = ConfigDict(frozen=True)

    node_id: str
    process_id: int
    contained: bool
    """Its process id is not the one that the kernel's log would name."""
    group: str
    """Path of its control group for memory; "/" in a container that sees no further."""
    log: str
    """Path of its stderr; empty when it is no file."""
    oom_kills: int
    """Of its control group so far."""
    boot_seconds: float
    """On the node's clock since boot."""

    def was(self, process_id: int, group: str) -> bool:
        """Whether a process that the kernel killed may have been this one."""
        if not self.contained:
            return process_id == self.process_id
        return group == self.group


class Evidence(BaseModel):
    """What was found."""

    model_config = ConfigDict(frozen=True)

    worker_log: str = ""
    kernel: str = ""


def facts_here(node_id: str) -> WorkerFacts:
    """Of this process."""
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
    """Look for traces of a worker on the node where it ran."""
    kernel = "\n".join(kernel_lines(_kernel_records(), facts, _boot_seconds()))
    kills = oom_kills(facts.group)
    if not kernel and kills > facts.oom_kills:
        kernel = f"the kernel's count of processes killed for memory in this control group: {facts.oom_kills} -> {kills}"
    return Evidence(worker_log=_tail(facts.log), kernel=kernel)


def kernel_lines(records: Iterable[str], facts: WorkerFacts, now_seconds: float) -> list[str]:
    """What the kernel's records (priority,sequence,microseconds,...;text) say of the end of a worker; times since boot."""
    since = max(facts.boot_seconds, now_seconds - _RECENT_SECONDS)
    texts = [text for seconds, text in map(_parted, records) if seconds >= since]
    victims = [(match["id"], match["group"]) for match in map(_VICTIM.search, texts) if match]
    mine = {victim for victim, group in victims if facts.was(int(victim), group)}
    return [text for text in texts if any(match and match["id"] in mine for match in (_VICTIM.search(text), _KILLED.search(text)))]


def _parted(record: str) -> tuple[float, str]:
    """Seconds since boot, and the first line of what is said."""
    head, _, text = record.partition(";")
    parts = head.split(",")
    seconds = int(parts[2]) / 1e6 if len(parts) > 2 and parts[2].isdigit() else -1.0
    return seconds, text.partition("\n")[0]


def _kernel_records() -> list[str]:
    """What /dev/kmsg holds; nothing where it may not be read."""
    records: list[str] = []
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return records
    try:
        while True:
            try:
                records.append(os.read(handle, _RECORD_BYTES).decode(errors="replace"))
            except BrokenPipeError:  # it was overwritten meanwhile; the next one is there
                continue
    except OSError:  # the end
        return records
    finally:
        os.close(handle)


def _boot_seconds() -> float:
    """Now, as the kernel's records count."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return log.read().decode(errors="replace")
    except OSError:
        return ""
