"""A limit on the memory of some processes: a control group of Linux, under the one that this process is in. Needs root."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from orchestrator.work.lost import memory_group

_FIRST = Path("/sys/fs/cgroup/memory")
"""Where version 1 keeps the groups for memory."""
_SECOND = Path("/sys/fs/cgroup")
_END_SECONDS = 10.0


class MemoryGroup:
    """A group; processes enter it by writing their id to `entrance`, and their children stay in it."""

    def __init__(self, name: str) -> None:
        """One of this name that a killed run left is replaced. Raises OSError where there is no place, or its processes live."""
        place = place_for_groups()
        if place is None:
            raise OSError("no control group for memory can be made here")
        self.folder = place / name
        with contextlib.suppress(FileNotFoundError):
            self.folder.rmdir()
        self.folder.mkdir()

    @property
    def entrance(self) -> Path:
        return self.folder / "cgroup.procs"

    def limit(self, num_bytes: int | None) -> None:
        """What the processes may hold together; None: everything."""
        limit = self.folder / "memory.limit_in_bytes"
        if limit.exists():
            limit.write_text(str(num_bytes if num_bytes is not None else -1))
        else:
            (self.folder / "memory.max").write_text(str(num_bytes) if num_bytes is not None else "max")

    @property
    def used_bytes(self) -> int:
        """What they hold, without the copies of files that the kernel can drop."""
        now = next(path for path in (self.folder / "memory.usage_in_bytes", self.folder / "memory.current") if path.exists())
        said = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        files = sum(int(said.get(f"total_{name}", said[name])) for name in ("active_file", "inactive_file"))
        return int(now.read_text()) - files

    def remove(self) -> None:
        """Once its processes have ended."""
        end = time.monotonic() + _END_SECONDS
        while self.folder.exists() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)


def place_for_groups() -> Path | None:
    """Where a group may be made, as near to this process's own as can be; None: nowhere.

    Version 2 has none under a group that holds processes itself: there the nearest above that hands memory down is taken.
    """
    own = memory_group(Path("/proc/self/cgroup").read_text()).lstrip("/")
    first = _FIRST / own
    if (first / "memory.limit_in_bytes").exists():
        return first if os.access(first, os.W_OK) else None
    for folder in (_SECOND / own, *(_SECOND / own).parents):
        handed = folder / "cgroup.subtree_control"
        if handed.exists() and "memory" in handed.read_text().split():
            return folder if os.access(folder, os.W_OK) else None
    return None
