"""The process of a step: children that end with it and know nothing of its launcher, and its scratch folder."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_ROOM_BYTES = 2**20
"""Treat the disk as full below this many free bytes; block writes fail before the last byte is used."""
_POLL_SECONDS = 0.01
_LIBC = ctypes.CDLL(None)
_LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "MPI_", "MPIR_", "PRTE_", "SLURM_", "HYDRA_", "HYDI_")


def die_with_parent() -> None:
    """Ask Linux to end the child when the thread that started it dies, even by SIGKILL. For Popen's preexec_fn.

    The child stays in its parent's process group: Ray cleans that group up, but not a separate session.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def belong_to_parent() -> None:
    """Do as `die_with_parent`, and ignore Ctrl-C, which the parent alone answers. For a worker's preexec_fn."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def scratch_root(configured: str | None) -> str:
    """Return this machine's folder for the temporary files of steps, creating it if it is missing. Raises OSError."""
    folder = Path(configured or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def is_full(folder: Path) -> bool:
    """Whether the disk of `folder` is full."""
    return shutil.disk_usage(folder).free < _ROOM_BYTES


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables of MPI and Slurm: a child is no rank of that job, and may start its own."""
    return {name: value for name, value in environment.items() if not name.startswith(_LAUNCHER_PREFIXES)}


def end_descendants(name: str = "", wait_seconds: float = 0.0) -> None:
    """Kill the descendants of this process whose command line begins with `name`.

    Waits up to `wait_seconds` until the killed processes have released their files and locks.
    """
    killed = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not name or " ".join(process.cmdline()).startswith(name):
                process.kill()
                killed.append(process)
    end = time.monotonic() + wait_seconds
    while time.monotonic() < end and any(map(_is_alive, killed)):
        time.sleep(_POLL_SECONDS)


def _is_alive(process: psutil.Process) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
