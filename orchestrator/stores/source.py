"""Sources of checkpoints, a local folder or a URL: names, sizes, identities, and positioned reads.

Formats read through this protocol, so they need not know whether the bytes are on a disk or in object storage.
"""

from __future__ import annotations

import math
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol, Self

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import SourceCorruptError, SourceMissingError, SourceUnreadableError, is_text
from orchestrator.base.pages import PAGE_BYTES, is_on_page, page_buffer
from orchestrator.model.checkpoint import SourceFile, TensorInfo
from orchestrator.stores.identity import identity, matches

LFS_MAGIC = b"version https://git-lfs"
"""Beginning of a Git-LFS pointer."""

PlannedRange = tuple[int, int, int]
"""Announced read: file number, first byte, byte after the last."""


class ByteSource(Protocol):
    """Open files of a source; a context manager."""

    bytes_read: int
    """Bytes read so far."""

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of file number `file` from `offset`. Raises SourceCorruptError when the file ends early."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...


class SourceFolder(Protocol):
    """A folder of files, local or remote. Workers open it by `url`."""

    url: str

    def names(self) -> list[str]:
        """Return the sorted names of the files, in subfolders 'folder/name'. Raises SourceMissingError for a missing folder."""
        ...

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Read bytes [begin, end) of a file, to its end when None. Raises SourceMissingError."""
        ...

    def source_file(self, name: str) -> SourceFile:
        """Return a file of weights as it is now. Raises SourceMissingError."""
        ...

    def open(self, files: tuple[SourceFile, ...], planned: Iterable[PlannedRange] = ()) -> ByteSource:
        """Open files for reading in large blocks. Each is checked to be the file that the plan was made from.

        `planned`: announced reads, so that small neighbours can be fetched together. Other ranges may be read too.
        """
        ...


def planned_ranges(tensors: Iterable[TensorInfo]) -> Iterator[PlannedRange]:
    """Yield the byte ranges of tensors to read, without a format's own encoding."""
    for tensor in tensors:
        if tensor.encoding is not None:
            for part in tensor.encoding.parts():
                yield part.file, part.offset, part.offset + part.num_bytes
        elif tensor.array is not None:  # parts of an array share its chunks, which are read when the first part is
            continue
        elif tensor.assembly is None:
            yield tensor.file, tensor.offset, tensor.offset + tensor.num_bytes
        elif not tensor.assembly.encoding:
            for piece in tensor.assembly.pieces:
                yield piece.file, piece.offset, piece.offset + num_bytes(tensor.dtype, math.prod(piece.shape))


MAX_WHOLE_BYTES = 256 * 2**20
"""Largest file that is read whole; the largest tokenizers have a tenth of it."""
_NO_FILE = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Check a folder. Raises SourceMissingError when it is missing or no folder, SourceUnreadableError when it cannot be listed."""
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceMissingError(f"there is no folder {folder}", _advice(folder)) from None
    except (OSError, ValueError) as error:
        raise SourceUnreadableError(f"cannot look into {folder}: {error}") from None
    if not is_folder:
        raise SourceMissingError(f"{folder} is a file, not a folder", f"Give the folder that holds it: {folder.parent}.")


def _advice(folder: Path) -> str:
    """Return advice about a missing folder: it may be meant as a name of the hub."""
    name = "/".join(folder.parts[-2:])
    if folder.parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return "Check source.path in the spec: a relative one counts from the folder of the spec."
    return (
        f"Check source.path. If {name} is a model of the Hugging Face hub: hf download {name} --local-dir FOLDER, and give FOLDER; "
        f"or write hf://{name} to read it from the hub."
    )


def _cannot_list(error: OSError) -> NoReturn:
    raise SourceUnreadableError(f"cannot look into {error.filename}: {error.strerror}") from None


class LocalFolder:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)

    def names(self) -> list[str]:
        """Return the names of everything that is no folder. Reading refuses other kinds of files."""
        check_folder(self.folder)
        found: list[str] = []
        for path, _, files in os.walk(self.folder, onerror=_cannot_list):
            below = Path(path).relative_to(self.folder)
            found.extend((below / name).as_posix() for name in files)
        return sorted(found)

    def top_names(self) -> list[str]:
        """Return the names of the files directly in the folder; empty if it is no folder. Raises SourceUnreadableError."""
        try:
            with os.scandir(self.folder) as found:
                return sorted(entry.name for entry in found if not entry.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            _cannot_list(error)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        path = self.folder / name
        size = self._stat(name).st_size
        if end is None and size - begin > MAX_WHOLE_BYTES:
            raise SourceCorruptError(f"{path} has {size:,} bytes: no config or tokenizer is so large")
        try:
            with path.open("rb") as file:
                file.seek(begin)
                return file.read((size if end is None else end) - begin)
        except OSError as error:
            raise SourceUnreadableError(f"cannot read {path}: {error.strerror}") from None

    def _stat(self, name: str) -> os.stat_result:
        """Return the status of a file, following links. Raises SourceMissingError, SourceCorruptError, SourceUnreadableError."""
        path = self.folder / name
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            where = f" is a link to {path.readlink()}, which" if path.is_symlink() else ""
            raise SourceMissingError(
                f"{path}{where} is missing on this node",
                "Download the checkpoint again. Every node that converts must see the source under the same path.",
            ) from None
        except (OSError, ValueError) as error:
            raise SourceUnreadableError(f"cannot read {path}: {error}") from None
        if not stat.S_ISREG(found.st_mode):
            raise SourceCorruptError(f"{path} is {_NO_FILE.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file")
        return found

    def source_file(self, name: str) -> SourceFile:
        """Return a file. Identity: the sha256 of its content where known, else its time of modification; see identity.py.

        Any rewrite of a file changes its times. So the worst case is a needless rebuild, never a stale engine.
        """
        found = self._stat(name)
        if not is_text(name):
            raise SourceCorruptError(f"the name of the file {self.folder}/{name!a} is no UTF-8", "Rename it.")
        return SourceFile(name, found.st_size, identity(self.folder, name, found))

    def as_planned(self, planned: SourceFile) -> SourceFile:
        """Return a file as it is now; `planned` itself when it is the file of the plan. Raises as `source_file`."""
        found = self._stat(planned.name)
        if found.st_size == planned.num_bytes and matches(self.folder, planned.name, found, planned.identity):
            return planned
        return self.source_file(planned.name)

    def open(self, files: tuple[SourceFile, ...], planned: Iterable[PlannedRange] = ()) -> ByteSource:
        return FileSource(self, files)


class FileSource:
    """Local files, opened on first use and closed together. Several threads may read at once.

    preadv into reused buffers: memory-mapped slices read up to 8 times the bytes when the page cache is cold, and map badly over
    network file systems. Large ranges that are not in the page cache bypass it: each byte is read once, and filling the cache
    would cost more than all the copying of a conversion.
    """

    def __init__(self, place: LocalFolder, files: tuple[SourceFile, ...]) -> None:
        self._place, self._files = place, files
        self._descriptors: dict[int, int] = {}
        self._direct = _DirectReader()
        self._lock = threading.Lock()
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._direct.close()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        descriptor = self._open(file)
        done = 0
        if len(buffer) >= _DIRECT_BYTES and not _is_cached(descriptor, offset, len(buffer)):
            done = self._direct.read_into(descriptor, offset, buffer)
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise SourceCorruptError(f"{self._place.folder / self._files[file].name} ended at byte {offset + done}")
            done += count
        with self._lock:
            self.bytes_read += done

    def _open(self, file: int) -> int:
        """Open a file, once, if it still is the file of the plan."""
        with self._lock:
            if file not in self._descriptors:
                planned = self._files[file]
                check_unchanged(planned, self._place.as_planned(planned), self._place.url)
                path = self._place.folder / planned.name
                try:
                    self._descriptors[file] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise SourceUnreadableError(f"cannot read {path}: {error.strerror}") from None
            return self._descriptors[file]


_DIRECT_BYTES = 2**20
_DIRECT_BUFFER_BYTES = 8 * 2**20


class _DirectReader:
    """O_DIRECT reads: straight into the caller's buffer if it and the tensor are page-aligned, else through an aligned one.

    Each thread has its own buffer: nothing is read ahead without the page cache, so only parallel reads keep a disk busy.
    """

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._own = threading.local()
        self._lock = threading.Lock()
        self._works = hasattr(os, "O_DIRECT")

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._own = threading.local()

    def read_into(self, descriptor: int, offset: int, out: memoryview) -> int:
        """Fill `out` from its start. Returns the bytes filled: fewer at the file's end, or where O_DIRECT does not work."""
        done = 0
        while self._works and done < len(out):
            try:
                count = self._read_block(descriptor, offset + done, out[done:])
            except OSError:  # file systems may refuse it at open, or only when reading; a lasting error shows again without it
                self._works = False
                break
            if count <= 0:
                break
            done += count
        return done

    def _read_block(self, descriptor: int, offset: int, out: memoryview) -> int:
        direct = self._reopened(descriptor)
        skip = offset % PAGE_BYTES
        if skip == 0 and len(out) >= PAGE_BYTES and is_on_page(out):
            return os.preadv(direct, [out[: len(out) // PAGE_BYTES * PAGE_BYTES]], offset)
        if not hasattr(self._own, "buffer"):
            self._own.buffer = page_buffer(_DIRECT_BUFFER_BYTES)
        buffer: memoryview = self._own.buffer
        size = min(-(-(skip + len(out)) // PAGE_BYTES) * PAGE_BYTES, _DIRECT_BUFFER_BYTES)
        count = os.preadv(direct, [buffer[:size]], offset - skip)
        found = min(count - skip, len(out))
        if found > 0:
            out[:found] = buffer[skip : skip + found]
        return found

    def _reopened(self, descriptor: int) -> int:
        with self._lock:
            if descriptor not in self._descriptors:  # through /proc: surely the same file, even if renamed
                self._descriptors[descriptor] = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT)
            return self._descriptors[descriptor]


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether both ends of a range are in the page cache, or their state is unknown."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte = bytearray(1)
    try:
        return all(os.preadv(descriptor, [byte], place, os.RWF_NOWAIT) == 1 for place in (offset, offset + size - 1))
    except BlockingIOError:
        return False
    except OSError:
        return True


def check_unchanged(planned: SourceFile, found: SourceFile, where: str) -> None:
    """Check that a file is the file of the plan. Raises SourceCorruptError."""
    if found != planned:
        raise SourceCorruptError(
            f"{where}/{planned.name} is not the file that the plan was made from: {found.num_bytes} bytes {found.identity}, "
            f"planned {planned.num_bytes} bytes {planned.identity}",
            "Make the plan again; every node must see the same file, with the same time of modification.",
        )
