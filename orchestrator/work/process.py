"""The process of a step and its place: children that end with it and know nothing of its launcher, its scratch folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_ROOM_BYTES = 2**20
"""A disk with less is full: who writes in blocks leaves a part of one."""
_POLL_SECONDS = 0.01
_LIBC = ctypes.CDLL(None)
_LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "MPI_", "MPIR_", "PRTE_", "SLURM_", "HYDRA_", "HYDI_")


def die_with_parent() -> None:
    """For Popen's preexec_fn: ask Linux to end the child when the thread that started it dies, even by SIGKILL.

    The child stays in its parent's process group: Ray cleans that group up, a session of its own would survive.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def belong_to_parent() -> None:
    """For Popen's preexec_fn of a worker: as `die_with_parent`, and the parent alone answers Ctrl-C."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def scratch_root(configured: str | None) -> str:
    """The folder of this machine in which steps keep what is theirs for a while, made if it is not there. Raises OSError."""
    folder = Path(configured or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def is_full(folder: Path) -> bool:
    """Whether the disk of `folder` has no room left."""
    return shutil.disk_usage(folder).free < _ROOM_BYTES


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what MPI and Slurm told this process: a child is no rank of that job, and may start one of its own."""
    return {name: value for name, value in environment.items() if not name.startswith(_LAUNCHER_PREFIXES)}


def descendants(process: int) -> list[int]:
    """Processes that a process has started, and those that they have started, by /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for each in found:
        found.extend(children.get(each, []))
    return found[1:]


def end_descendants(name: str = "", wait_seconds: float = 0.0) -> None:
    """Kill what this process has started and what that has started, where its command line begins with `name`.

    Waits so long at most until the killed ones have let go of their files and locks.
    """
    killed = []
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if not name or Path(f"/proc/{process}/cmdline").read_text(errors="replace").startswith(name):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
    end = time.monotonic() + wait_seconds
    while time.monotonic() < end and any(is_running(process) for process in killed):
        time.sleep(_POLL_SECONDS)


def is_running(process: int) -> bool:
    """Whether a process is there and is no zombie, which waits for its parent only."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
