"""Large positioned reads of source files.

preadv into reused buffers: memory-mapped slices read up to 8 times the bytes when the page cache is cold, and map badly
over network file systems.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from orchestrator.core.errors import SourceCorruptError, SourceMissingError


class ByteSource(Protocol):
    """Where the bytes of tensors come from."""

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of file number `file` from `offset`. Raises SourceCorruptError when it ends early."""
        ...


class FileSource:
    """Files of this machine, opened on first use and closed together."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self._folder, self._names = folder, names
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
                raise SourceCorruptError(f"{self._folder / self._names[file]} ended at byte {offset + done}")
            done += count
        self.bytes_read += done

    def _open(self, file: int) -> int:
        if file not in self._descriptors:
            path = self._folder / self._names[file]
            try:
                self._descriptors[file] = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise SourceMissingError(
                    f"{path} is not there on this node", "Every node that converts must see the source under the same path."
                ) from None
        return self._descriptors[file]
