"""Where a source checkpoint lies: a folder of this machine. Names, sizes, identities, and positioned reads.

Formats read through this protocol, so that a format need not know whether its bytes are on a disk or in object storage.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from orchestrator.core.checkpoint import SourceFile
from orchestrator.core.errors import SourceCorruptError, SourceMissingError


class ByteSource(Protocol):
    """Open files of a source; a context manager."""

    bytes_read: int
    """So far."""

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of file number `file` from `offset`. Raises SourceCorruptError when it ends early."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...


class Place(Protocol):
    """A folder of files, wherever it is. `url` is what a worker opens it by."""

    url: str

    def names(self) -> list[str]:
        """Names of the files, sorted; those of folders below as 'folder/name'. Raises SourceMissingError without a place."""
        ...

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of a file, to its end when None. Raises SourceMissingError."""
        ...

    def source_file(self, name: str) -> SourceFile:
        """A file of weights as it is now. Raises SourceMissingError."""
        ...

    def open(self, files: tuple[SourceFile, ...]) -> ByteSource:
        """Open files for reading in large blocks; each is checked to be what the plan was made from."""
        ...


def open_place(url: str) -> Place:
    """The place at `url`: a path of this machine."""
    return LocalPlace(Path(url))


class LocalPlace:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            raise SourceMissingError(f"there is no folder {self.folder}", "Check source.path in the spec.")
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(begin)
                return file.read(-1 if end is None else end - begin)
        except (FileNotFoundError, NotADirectoryError):
            raise SourceMissingError(f"{self.folder / name} is not there") from None

    def source_file(self, name: str) -> SourceFile:
        """Identity: the sha256 by which a hub cache names the blob that it links to; else size and time of modification.

        Hashing hundreds of gigabytes to make a plan is out of the question. Any rewrite of a file changes its time, so the
        worst case is a needless rebuild, never a stale engine.
        """
        path = self.folder / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise SourceMissingError(
                f"{path} is not there on this node", "Every node that converts must see the source under the same path."
            ) from None
        blob = path.resolve().name
        identity = f"sha256:{blob}" if re.fullmatch(r"[0-9a-f]{64}", blob) else f"mtime:{stat.st_mtime_ns}"
        return SourceFile(name, stat.st_size, identity)

    def open(self, files: tuple[SourceFile, ...]) -> ByteSource:
        return FileSource(self, files)


class FileSource:
    """Files of this machine, opened on first use and closed together.

    preadv into reused buffers: memory-mapped slices read up to 8 times the bytes when the page cache is cold, and map
    badly over network file systems.
    """

    def __init__(self, place: LocalPlace, files: tuple[SourceFile, ...]) -> None:
        self._place, self._files = place, files
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
                raise SourceCorruptError(f"{self._place.folder / self._files[file].name} ended at byte {offset + done}")
            done += count
        self.bytes_read += done

    def _open(self, file: int) -> int:
        """Open a file, once, if it still is what the plan was made from."""
        if file not in self._descriptors:
            planned = self._files[file]
            check_unchanged(planned, self._place.source_file(planned.name), self._place.url)
            self._descriptors[file] = os.open(self._place.folder / planned.name, os.O_RDONLY)
        return self._descriptors[file]


def check_unchanged(planned: SourceFile, found: SourceFile, where: str) -> None:
    """Raises SourceCorruptError when a file is not the one that the plan was made from."""
    if found != planned:
        raise SourceCorruptError(
            f"{where}/{planned.name} is not the file that the plan was made from: {found.num_bytes} bytes {found.identity}, "
            f"planned {planned.num_bytes} bytes {planned.identity}",
            "Make the plan again; every node must see the same file, with the same time of modification.",
        )
