"""Large positioned reads of source files.

preadv into reused buffers: memory-mapped slices read up to 8 times the bytes when the page cache is cold, and map badly
over network file systems.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from orchestrator.core.checkpoint import SourceFile
from orchestrator.core.errors import SourceCorruptError, SourceMissingError


def source_file(folder: Path, name: str) -> SourceFile:
    """A file of weights as it is now. Raises FileNotFoundError.

    Identity: the sha256 by which a hub cache names the blob that it links to; else size and time of modification. Hashing
    hundreds of gigabytes to make a plan is out of the question. Any rewrite of a file changes its time, so the worst case
    is a needless rebuild, never a stale engine.
    """
    path = folder / name
    stat = path.stat()
    blob = path.resolve().name
    identity = f"sha256:{blob}" if re.fullmatch(r"[0-9a-f]{64}", blob) else f"mtime:{stat.st_mtime_ns}"
    return SourceFile(name, stat.st_size, identity)


class ByteSource(Protocol):
    """Where the bytes of tensors come from."""

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of file number `file` from `offset`. Raises SourceCorruptError when it ends early."""
        ...


class FileSource:
    """Files of this machine, opened on first use and closed together."""

    def __init__(self, folder: Path, files: tuple[SourceFile, ...]) -> None:
        self._folder, self._files = folder, files
        self._descriptors: dict[int, int] = {}
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        descriptor = self._open(file)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise SourceCorruptError(f"{self._folder / self._files[file].name} ended at byte {offset + done}")
            done += count
        self.bytes_read += done

    def _open(self, file: int) -> int:
        """Open a file, once, if it still is what the plan was made from."""
        if file not in self._descriptors:
            planned = self._files[file]
            path = self._folder / planned.name
            try:
                found = source_file(self._folder, planned.name)
                self._descriptors[file] = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise SourceMissingError(
                    f"{path} is not there on this node", "Every node that converts must see the source under the same path."
                ) from None
            if found != planned:
                raise SourceCorruptError(
                    f"{path} is not the file that the plan was made from: {found.num_bytes} bytes {found.identity}, "
                    f"planned {planned.num_bytes} bytes {planned.identity}",
                    "Make the plan again; every node must see the same file, with the same time of modification.",
                )
        return self._descriptors[file]
