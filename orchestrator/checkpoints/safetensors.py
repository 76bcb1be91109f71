"""The safetensors format: an 8-byte little-endian header length, that many bytes of JSON, then one data buffer.

Source: the format's specification in the safetensors README. The format has no checksum, so a reader can only check the
header against the file's size. Writers here record a sha256 beside the file.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.base.dtypes import ITEM_BITS, num_bytes
from orchestrator.base.errors import LfsPointerError, SourceCorruptError, abbreviated, is_text
from orchestrator.stores.source import LFS_MAGIC, LocalFolder, SourceFolder

MAX_HEADER_BYTES = 100_000_000
"""Largest header, as in the safetensors library."""
_FIRST_READ_BYTES = 256 * 1024
"""Size of the first read. It covers most headers, so that a file in object storage costs one request."""
_MAX_AXES = 16
_DATA_ALIGNMENT = 4096
"""Alignment of the data. The header is padded with spaces so that the data starts on a page."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a header. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def encode_header(entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that holds `entries` (name, dtype, shape) in this order without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in entries:
        size = num_bytes(dtype, math.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[list[HeaderEntry], dict[str, str]]:
    """Read and check a file's header.

    Returns the tensors in file order and the metadata. Raises LfsPointerError and SourceCorruptError: a file that is
    shorter or longer than its header says, offsets that overlap, leave holes or contradict dtype and shape.
    """
    return read_header_at(LocalFolder(path.parent), path.name)


def read_header_at(folder: SourceFolder, name: str) -> tuple[list[HeaderEntry], dict[str, str]]:
    """Read and check the header of a file of any source, as `read_header` does."""
    path = f"{folder.url}/{name}"
    total = folder.source_file(name).num_bytes
    start = folder.read(name, 0, min(_FIRST_READ_BYTES, total))
    if start.startswith(LFS_MAGIC):
        raise LfsPointerError(f"{path} is a Git-LFS pointer, not weights")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > total:
        raise SourceCorruptError(f"{path} is not a safetensors file, or is truncated: {total} bytes, header of {length}")
    text = start[8 : 8 + length]
    if len(text) < length:
        text += folder.read(name, len(start), 8 + length)
    try:
        plain = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(plain, dict):
            raise ValueError("it is not a JSON object")
        metadata = plain.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("__metadata__ is not a JSON object")
        entries = [_entry(name, fields, 8 + length) for name, fields in plain.items()]
    except (ValueError, RecursionError) as error:
        raise SourceCorruptError(f"{path}: the safetensors header is damaged: {abbreviated(str(error), 300)}") from None
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_layout(path, entries, 8 + length, total)
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{abbreviated(name, 100)} occurs twice")
    return found


def _entry(name: str, fields: Any, data_start: int) -> HeaderEntry:
    """Decode and check an entry of the header. Raises ValueError."""
    shown = abbreviated(name, 100)
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise ValueError(f"{shown} has no dtype, shape and data_offsets")
    if not is_text(name):
        raise ValueError(f"the name {shown!a} is not a text")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ValueError(f"{shown} has the unknown dtype {abbreviated(repr(dtype), 40)}")
    if not _are_counts(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"{shown} has the malformed shape {abbreviated(repr(shape), 60)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} has the malformed data_offsets {abbreviated(repr(offsets), 60)}")
    begin, end = offsets
    if end - begin != num_bytes(dtype, math.prod(shape)):
        raise ValueError(f"{shown}: bytes {begin}..{end} do not hold {dtype} {shape}")
    return HeaderEntry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _are_counts(value: Any) -> bool:
    """Whether the value is a list of integers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _check_layout(path: str, entries: list[HeaderEntry], data_start: int, total: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position:
            raise SourceCorruptError(f"{path}: {entry.name} starts at byte {entry.offset}, expected {position}")
        position += entry.num_bytes
    if position > total:
        raise SourceCorruptError(f"{path} is truncated: {total} bytes, its header needs {position}")
    if position < total:
        raise SourceCorruptError(f"{path} has {total - position} bytes that its header does not name")
