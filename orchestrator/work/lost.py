"""Why a process, or a group of processes under a launcher, ended without a word of its own: by evidence, never by default.

A process that the kernel killed for memory is tried again elsewhere, and so is one that vanished. A launcher that never started
anything, and ranks that are strangers to each other, would fail again anywhere: that is an error of the tools, with their words.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from orchestrator.core.step import Cause, Failure, FailureKind

_TAIL_BYTES = 4000
_STARTED, _FAILED = "rank started", "rank failed:"
TOOL = "tool"
"""A rank failed because its tools do not fit: no Cause, since it would happen again."""
_WORDS = re.compile(rf"{_FAILED}({TOOL}|{'|'.join(filter(None, Cause))}|)")
"""Launchers may run the lines of two ranks together."""
_CRASHED = re.compile(r"signal (4|6|7|8|11)\b")
"""How launchers tell of a rank that a bug has ended: illegal instruction, abort, bus error, arithmetic, segmentation fault."""
_KILLED = re.compile(r"signal 9\b|EXIT CODE: (9|137)\b")
"""How they tell of one that was killed: Open MPI's words, Hydra's words."""
_KILLED_CODES = (-9, 9, 137)
_COUNTS = (
    "/sys/fs/cgroup{group}/memory.events",
    "/sys/fs/cgroup/memory{group}/memory.oom_control",
    "/sys/fs/cgroup/memory.events",
    "/sys/fs/cgroup/memory/memory.oom_control",
)
"""Where a group's count of killed processes may be: cgroup v2, v1, and both as a container sees its own."""


@dataclass
class Ranks:
    """What ranks and their launcher said on stdout."""

    started: bool = False
    failed: list[str] = field(default_factory=list)
    """Values of Cause, or TOOL, in the order of arrival; what a bug ended is UNKNOWN."""
    killed: bool = False

    def hear(self, line: str) -> None:
        """Take in a line."""
        self.started = self.started or _STARTED in line
        self.failed += _WORDS.findall(line)
        self.failed += [Cause.UNKNOWN.value] * bool(_CRASHED.search(line))
        self.killed = self.killed or bool(_KILLED.search(line))


@dataclass(frozen=True, slots=True)
class Loss:
    """What became of ranks whose launcher ended with an error."""

    cause: Cause = Cause.UNKNOWN
    """What lies under it; UNKNOWN: it would happen again."""
    of_tools: bool = False
    """The launcher or a library of the ranks does not work here."""
    how: str = ""
    """What happened to a rank, as the rest of a sentence that begins with it."""


def diagnose(ranks: Ranks, code: int, *, num_oom_kills: int) -> Loss:
    """`code`: how the launcher ended. `num_oom_kills`: processes of this control group that the kernel killed meanwhile."""
    failed = _first(ranks.failed)
    if failed == TOOL:
        return Loss(of_tools=True, how="cannot work with the others")
    if failed:
        cause = Cause(failed)
        return Loss(cause, how=_SHORT if cause is Cause.MEMORY else f"lacked {cause.value}")
    if ranks.failed:
        return Loss(how="failed")
    if num_oom_kills > 0 or ranks.killed or code in _KILLED_CODES:
        return Loss(Cause.MEMORY, how=_SHORT)
    if not ranks.started:
        return Loss(of_tools=True, how="never started")
    # Hydra, when a rank is killed, ends at times with code 255 and no words.
    return Loss(Cause.WORKER, how="was lost without a word")


_SHORT = "was killed, as the kernel does when memory is short"


def _first(failed: list[str]) -> str:
    """The root of what ranks reported: one rank's full disk is the other ranks' broken communicator."""
    return next(filter(None, failed), "")


def say_started() -> None:
    """For a rank, before anything that can fail."""
    print(f"\n{_STARTED}", flush=True)


def say_failed(why: str) -> None:
    """For a rank, as its last word: TOOL or a value of Cause. A killed one cannot say so."""
    print(f"\n{_FAILED}{why}", flush=True)


def crash(code: int, node: str, log: IO[bytes], num_oom_kills: int = 0) -> Failure:
    """The record of a step's process that ended without a final event: killed, or crashed in native code."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(size - _TAIL_BYTES, 0))
    tail = log.read().decode(errors="replace")
    reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    cause, kernel = Cause.WORKER, ""
    if code in _KILLED_CODES and num_oom_kills > 0:
        cause, kernel = Cause.MEMORY, f"the kernel killed {num_oom_kills} processes of this control group for memory meanwhile"
        reason = "was killed for memory by the kernel"
    message = f"the step's process {reason}"
    return Failure(
        kind=FailureKind.INFRASTRUCTURE, cause=cause, message=message, node=node, log_tail=tail, kernel=kernel
    )  # fmt: skip


def memory_group(text: str) -> str:
    """The control group for memory that /proc/PID/cgroup names; "" when it names none."""
    lines = [line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2]
    first = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
    unified = [path for number, controllers, path in lines if (number, controllers) == ("0", "")]
    return next(iter([*first, *unified]), "")


def oom_kills(group: str | None = None) -> int:
    """Processes of a control group, by default this process's, that the kernel killed so far; 0 where it does not say."""
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
