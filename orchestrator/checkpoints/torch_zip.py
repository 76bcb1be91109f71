"""Reader of torch.save files as byte ranges, without torch and without running pickled code.

Since PyTorch 1.6 such a file is a zip archive: `<archive>/data.pkl` is a pickle that describes the tensors, and each storage
is an uncompressed member `<archive>/data/<key>` (torch/serialization.py, `_save`). So a contiguous tensor is a range of the
file. A pickle is a program, so the reader accepts only the few names that tensors need.
"""

from __future__ import annotations

import collections
import io
import math
import pickle  # only through _Unpickler, which refuses every name but those of tensors
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import LfsPointerError, OrchestratorError, SourceCorruptError, UnsafePickleError
from orchestrator.checkpoints.safetensors import HeaderEntry
from orchestrator.stores.source import LFS_MAGIC, SourceFolder

_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_LOCAL_HEADER_BYTES = 30
_LOCAL_CHECKSUM = 14
"""Place of the checksum of a member in its local header, 4 bytes."""
_LOCAL_HEADER_MAGIC = b"PK\x03\x04"
_ZIP_MAGIC = b"PK"
_MAX_PICKLE_BYTES = 256 * 2**20
"""Largest data.pkl. It only describes tensors: a thousand of them take a hundred kilobytes."""
_BUFFER_BYTES = 256 * 1024
_HEAD_BYTES, _TAIL_BYTES = 2048, 2048
"""First and last bytes of an archive with one tensor, which hold its pickle and its table with room to spare."""
_HEADER_THREADS = 8
_RESAVE = "Load it with torch in a sandbox and save it as safetensors, tensors made contiguous."


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    first: int
    """Index of the tensor's first element in the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(folder: SourceFolder, name: str) -> list[HeaderEntry]:
    """Read the descriptions of the tensors that torch.save wrote to `name`, in its order. Tensors may share bytes.

    Raises SourceMissingError, LfsPointerError, SourceCorruptError; UnsafePickleError for a pickle that names anything but
    tensors, and for the format before PyTorch 1.6, which cannot be read without running it.
    """
    path, total = f"{folder.url}/{name}", folder.source_file(name).num_bytes
    archive = _Archive(path, total, lambda begin, end: folder.read(name, begin, end), _BUFFER_BYTES)
    plain = archive.plain()
    if not isinstance(plain, dict):
        raise SourceCorruptError(f"{path} holds a {type(plain).__name__}, not a dictionary of tensors", _RESAVE)
    for key, value in plain.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            raise SourceCorruptError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor", _RESAVE)
    return archive.entries(plain)


class TensorArchives:
    """Reader of archives with one tensor each, of which a file of a folder holds many.

    An archive that begins like an earlier one of the same size describes a tensor of the same dtype and shape at the same
    place, so the rest of it is not read: what torch.save writes before the elements differs in their checksum alone.
    """

    def __init__(self, folder: SourceFolder) -> None:
        self._folder = folder
        self._known: dict[int, list[tuple[bytes, int, HeaderEntry]]] = {}

    def read(self, name: str, offset: int, size: int) -> HeaderEntry:
        """Read the description of the tensor that torch.save wrote to bytes [offset, offset + size) of `name`.

        The result's name is empty, its offset counts from the start of the file. Takes a request of two kilobytes, and another
        where the archive is the first of its kind. Raises as `read_tensors` does.
        """
        head = self._folder.read(name, offset, offset + min(size, _HEAD_BYTES))
        for start, checksum, entry in self._known.get(size, ()):
            if _without(head[: len(start) + 4], checksum) == start:
                return replace(entry, offset=offset + entry.offset)
        path = f"{self._folder.url}/{name} at byte {offset}"
        ends = _Ends(lambda begin, end: self._folder.read(name, offset + begin, offset + end), size, head)
        archive = _Archive(path, size, ends.read, 0)
        plain = archive.plain()
        if not isinstance(plain, _Tensor):
            raise SourceCorruptError(f"{path} holds a {type(plain).__name__}, not a tensor", _RESAVE)
        (entry,) = archive.entries({"": plain})
        checksum = archive.local_header(plain) + _LOCAL_CHECKSUM
        if checksum + 4 <= entry.offset <= len(head):
            self._known.setdefault(size, []).append((_without(head[: entry.offset], checksum), checksum, entry))
        return replace(entry, offset=offset + entry.offset)


def _without(data: bytes, checksum: int) -> bytes:
    """Return data without the four bytes at `checksum`."""
    return data[:checksum] + data[checksum + 4 :]


_Read = Callable[[int, int], bytes]
"""Read bytes [begin, end)."""


class _Ends:
    """Reader that has the first bytes of an archive, fetches the last once, and others on demand."""

    def __init__(self, read: _Read, size: int, head: bytes) -> None:
        self._read = read
        tail = max(len(head), size - _TAIL_BYTES)
        self._held = ((0, head), (tail, read(tail, size) if tail < size else b""))

    def read(self, begin: int, end: int) -> bytes:
        for first, data in self._held:
            if first <= begin and end <= first + len(data):
                return data[begin - first : end - first]
        return self._read(begin, end)


class _Archive:
    """An archive of torch.save: its pickle and its members."""

    def __init__(self, path: str, total: int, read: _Read, buffer_bytes: int) -> None:
        """`path` is for messages, `total` the size, `read` reads ranges, of at least `buffer_bytes` where more follows."""
        self._path, self._total, self._read = path, total, read
        _check_magic(path, read(0, min(total, len(LFS_MAGIC))))
        raw = _PlaceFile(read, total)
        try:
            with zipfile.ZipFile(io.BufferedReader(raw, buffer_bytes) if buffer_bytes else raw) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
                self._prefix = _archive_name(path, self._members)
                self._pickle = archive.read(_pickle_member(path, self._members, self._prefix))
                order = f"{self._prefix}byteorder"
                if order in self._members and archive.read(order) != b"little":
                    raise SourceCorruptError(f"{path} was written on a big-endian machine", _RESAVE)
        except OrchestratorError:
            raise
        except Exception as error:  # zipfile raises nearly anything for a damaged archive
            raise SourceCorruptError(f"{path} is truncated or damaged: {error}") from None

    def plain(self) -> Any:
        """Return the pickled object, tensors as _Tensor. Raises UnsafePickleError, SourceCorruptError."""
        return _unpickle(self._path, self._pickle)

    def local_header(self, tensor: _Tensor) -> int:
        """Return the place of the local header of a tensor's storage."""
        return self._members[f"{self._prefix}data/{tensor.storage.key}"].header_offset

    def entries(self, tensors: Mapping[str, _Tensor]) -> list[HeaderEntry]:
        """Return the descriptions of tensors of the pickle, with their places in the archive."""
        members = [_storage_member(self._path, self._members, self._prefix, tensor) for tensor in tensors.values()]
        starts = _data_starts(self._path, self._read, self._total, members)
        return [_entry(self._path, key, tensor, self._members, starts, self._prefix) for key, tensor in tensors.items()]


def _check_magic(path: str, start: bytes) -> None:
    if start.startswith(LFS_MAGIC):
        raise LfsPointerError(f"{path} is a Git-LFS pointer, not weights")
    if start.startswith(_ZIP_MAGIC):
        return
    if start.startswith(b"\x80"):
        raise UnsafePickleError(f"{path} is a bare pickle, as PyTorch wrote before 1.6", _RESAVE)
    raise SourceCorruptError(f"{path} is not a file of torch.save")


class _PlaceFile(io.RawIOBase):
    """Seekable file for zipfile that reads ranges of a source file."""

    def __init__(self, read: _Read, size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise OSError("seek before the start of the file")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        if end <= self._position:
            return 0
        data = self._read(self._position, end)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def _archive_name(path: str, members: dict[str, zipfile.ZipInfo]) -> str:
    """Return '<archive>/', the folder of data.pkl. It is named after the file that was first written."""
    found = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise SourceCorruptError(f"{path} is a zip archive without one data.pkl: not a file of torch.save, or TorchScript")
    return found[0]


def _pickle_member(path: str, members: dict[str, zipfile.ZipInfo], prefix: str) -> zipfile.ZipInfo:
    member = members[f"{prefix}data.pkl"]
    if member.file_size > _MAX_PICKLE_BYTES:
        raise SourceCorruptError(f"{path}: data.pkl has {member.file_size} bytes, too many for a description of tensors")
    return member


class _RebuildTensor:
    """Stand-in for torch._utils._rebuild_tensor_v2. It has no attributes, because a pickle could set them."""

    __slots__ = ()

    def __call__(self, storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        """Return the tensor. Gradients, hooks and metadata are ignored."""
        shape, strides = tuple(shape), tuple(strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError("a tensor without a storage")
        if not all(isinstance(number, int) and number >= 0 for number in (first, *shape, *strides)):
            raise ValueError("a tensor of impossible sizes")
        return _Tensor(storage, first, shape, strides)


class _RebuildParameter:
    """Stand-in for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


class _Unpickler(pickle.Unpickler):
    """Unpickler that accepts the names that tensors need, and refuses all others before they are looked up."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return "U8"
        raise UnsafePickleError(f"{self._path} asks for {module}.{name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"an unknown reference {kind!r}")
        return _Storage(dtype, key, count)


def _unpickle(path: str, data: bytes) -> Any:
    try:
        return _Unpickler(data, path).load()
    except OrchestratorError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise SourceCorruptError(f"{path}: data.pkl is damaged: {error}") from None


def _storage_member(path: str, members: dict[str, zipfile.ZipInfo], prefix: str, tensor: _Tensor) -> zipfile.ZipInfo:
    """Return the member with a tensor's storage. Raises SourceCorruptError if it is missing, compressed or of a wrong size."""
    storage = tensor.storage
    member = members.get(f"{prefix}data/{storage.key}")
    if member is None:
        raise SourceCorruptError(f"{path} lacks the storage {storage.key}")
    if member.compress_type != zipfile.ZIP_STORED:
        raise SourceCorruptError(f"{path}: the storage {storage.key} is compressed, which torch.save never does", _RESAVE)
    if member.file_size != num_bytes(storage.dtype, storage.num_elements):
        raise SourceCorruptError(
            f"{path}: the storage {storage.key} has {member.file_size} bytes for {storage.num_elements} elements of {storage.dtype}"
        )
    return member


def _data_starts(path: str, read: _Read, total: int, members: list[zipfile.ZipInfo]) -> dict[str, int]:
    """Return the offset of each member's data in the file. It follows the local header, which alone records its padding."""
    once = {member.filename: member for member in members}

    def start(member: zipfile.ZipInfo) -> int:
        header = member.header_offset
        local = read(header, header + _LOCAL_HEADER_BYTES)
        if len(local) < _LOCAL_HEADER_BYTES or not local.startswith(_LOCAL_HEADER_MAGIC):
            raise SourceCorruptError(f"{path}: no member of the archive starts at byte {header}")
        data = header + _LOCAL_HEADER_BYTES + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        if data + member.file_size > total:
            raise SourceCorruptError(f"{path}: {member.filename} reaches beyond the end of the file")
        return data

    if len(once) == 1:
        return {name: start(member) for name, member in once.items()}
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        return dict(zip(once, pool.map(start, once.values()), strict=True))


def _entry(
    path: str, key: str, tensor: _Tensor, members: dict[str, zipfile.ZipInfo], starts: dict[str, int], prefix: str
) -> HeaderEntry:
    if not _is_contiguous(tensor):
        raise SourceCorruptError(f"{path}: {key} is not contiguous (shape {tensor.shape}, strides {tensor.strides})", _RESAVE)
    member = f"{prefix}data/{tensor.storage.key}"
    offset = num_bytes(tensor.storage.dtype, tensor.first)
    size = num_bytes(tensor.storage.dtype, math.prod(tensor.shape))
    if offset + size > members[member].file_size:
        raise SourceCorruptError(f"{path}: {key} reaches beyond the end of its storage")
    return HeaderEntry(key, tensor.storage.dtype, tensor.shape, starts[member] + offset, size)


def _is_contiguous(tensor: _Tensor) -> bool:
    """Whether the elements are in C order without gaps. Strides of axes with one element, and of empty tensors, do not matter."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != expected:
            return math.prod(tensor.shape) == 0
        expected *= size
    return True
