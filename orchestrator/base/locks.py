"""Folders that belong to running processes, by flock's lock on the folder itself.

The kernel releases it when the last process that holds it ends, for whatever reason, and processes in other containers of the same
machine see it too. On a file system without such locks, folders of ended processes stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path


def hold(folder: Path) -> int:
    """Lock a folder together with others who hold it, until the returned descriptor is closed. Raises OSError."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def remove_unheld(folder: Path) -> bool:
    """Remove a folder of this user that nobody holds. Returns whether it did; never raises."""
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while somebody holds it
                shutil.rmtree(folder, ignore_errors=True)
                return True
        finally:
            os.close(lock)
    return False
