"""The datasets of an HDF5 file of any source: dtype, shape, and where their bytes lie. Nothing of their content is read.

h5py reads the file's own tables, by blocks. The bytes of a dataset that is stored in one piece lie in the file as they lie in a
safetensors file, so they are read as ranges. Source: the HDF5 file format specification, contiguous storage layout.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import DtypeError, LfsPointerError, QuantizationError, SourceCorruptError, abbreviated, is_text
from orchestrator.checkpoints.safetensors import HeaderEntry
from orchestrator.stores.source import LFS_MAGIC, SourceFolder

if TYPE_CHECKING:
    import h5py

_BLOCK_BYTES = 64 * 2**10
_MAX_BLOCKS = 1024
_DTYPES = {"<f2": "F16", "<f4": "F32", "<f8": "F64"}
_NAMED = {"bfloat16": "BF16"}
"""Dtypes that HDF5 does not know: Keras stores their bits, and the name in the attribute `dtype`."""
_QUANTIZED = ("int", "uint", "float8", "float4")


def read_datasets(folder: SourceFolder, name: str) -> tuple[list[HeaderEntry], dict[str, str]]:
    """Return the datasets of a file by their paths in it, and the attribute `name` of its groups.

    Raises SourceMissingError, LfsPointerError, SourceCorruptError, DtypeError; QuantizationError for integers and 8-bit floats;
    ToolError without h5py.
    """
    from orchestrator.base.extras import require

    require("keras")
    import h5py

    where, total = f"{folder.url}/{name}", folder.source_file(name).num_bytes
    if folder.read(name, 0, min(total, len(LFS_MAGIC))) == LFS_MAGIC:
        raise LfsPointerError(f"{where} is a Git-LFS pointer, not weights")
    entries: list[HeaderEntry] = []
    labels: dict[str, str] = {}

    def visit(path: str, found: h5py.Dataset | h5py.Group) -> None:
        if isinstance(found, h5py.Dataset):
            entries.append(_entry(where, path, found, total))
        elif isinstance(label := found.attrs.get("name"), str):
            labels[path] = label

    try:
        with h5py.File(io.BufferedReader(_Ranges(folder, name, total), 1), "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # what h5py raises for a damaged file
        raise SourceCorruptError(
            f"{where} is truncated or damaged ({total:,} bytes): {abbreviated(str(error), 200)}", "Download the file again."
        ) from None
    return entries, labels


def _entry(where: str, path: str, dataset: h5py.Dataset, total: int) -> HeaderEntry:
    """Describe a dataset. Raises SourceCorruptError, DtypeError, QuantizationError."""
    shown = abbreviated(path, 100)
    if not is_text(path):
        raise SourceCorruptError(f"{where}: the name {shown!a} is not a text")
    dtype, shape = _dtype(where, shown, dataset), tuple(int(size) for size in dataset.shape)
    size = num_bytes(dtype, math.prod(shape))
    offset = dataset.id.get_offset()
    if offset is None or dataset.chunks is not None or dataset.is_virtual or dataset.external:
        raise SourceCorruptError(
            f"{where}: {shown} is not stored in one piece (chunked, compressed, virtual, or without data)",
            "Save the model again with KerasHub, which stores each variable in one piece.",
        )
    if offset + size > total:
        raise SourceCorruptError(
            f"{where} is truncated: {total} bytes, {shown} ends at {offset + size}", "Download the file again."
        )
    return HeaderEntry(path, dtype, shape, offset, size)


def _dtype(where: str, shown: str, dataset: h5py.Dataset) -> str:
    stored = dataset.dtype.str
    named = dataset.attrs.get("dtype", dataset.dtype.name)
    if stored in _DTYPES:
        return _DTYPES[stored]
    if named in _NAMED and dataset.dtype.itemsize == 2:
        return _NAMED[named]
    name = abbreviated(str(named), 40)
    if name.startswith(_QUANTIZED):
        raise QuantizationError(f"{where}: {shown} is quantized ({name})", "Build from the preset that was not quantized.")
    raise DtypeError(f"{where}: {shown} has dtype {name}, which is not read", "Save the model in bfloat16, float16 or float32.")


class _Ranges(io.RawIOBase):
    """A file of a source as h5py reads it: by blocks, the latest of which are held."""

    def __init__(self, folder: SourceFolder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._position = folder, name, size, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, skip = divmod(self._position, _BLOCK_BYTES)
        part = self._block(number)[skip : skip + len(buffer)] if self._position < self._size else b""
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            begin = number * _BLOCK_BYTES
            self._blocks[number] = self._folder.read(self._name, begin, min(begin + _BLOCK_BYTES, self._size))
            if len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]
