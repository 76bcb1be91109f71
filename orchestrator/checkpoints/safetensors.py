"""The safetensors format: an 8-byte little-endian header length, that many bytes of JSON, then one data buffer.

Source: the format's specification in the safetensors README. The format has no checksum, so a reader can only prove that
the header is consistent with the file's size; writers of ours record sha256 beside the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoints.places import LFS_MAGIC, LocalPlace, Place
from orchestrator.core.dtypes import ITEM_BITS, num_bytes
from orchestrator.core.errors import LfsPointerError, SourceCorruptError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_FIRST_READ_BYTES = 256 * 1024
"""Holds most headers whole, so that a file in object storage costs one request."""
_DATA_ALIGNMENT = 4096
"""The header is padded with spaces so that data starts on a page."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a header; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def encode_header(entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file that holds `entries` (name, dtype, shape) back to back in this order."""
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
    return read_header_at(LocalPlace(path.parent), path.name)


def read_header_at(place: Place, name: str) -> tuple[list[HeaderEntry], dict[str, str]]:
    """`read_header` of a file at any place."""
    path = f"{place.url}/{name}"
    total = place.source_file(name).num_bytes
    start = place.read(name, 0, min(_FIRST_READ_BYTES, total))
    if start.startswith(LFS_MAGIC):
        raise LfsPointerError(f"{path} is a Git-LFS pointer, not weights")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > total:
        raise SourceCorruptError(f"{path} is not a safetensors file, or is truncated: {total} bytes, header of {length}")
    text = start[8 : 8 + length]
    if len(text) < length:
        text += place.read(name, len(start), 8 + length)
    try:
        plain = json.loads(text)
        metadata = plain.pop("__metadata__", None) or {}
        entries = [_entry(name, fields, 8 + length) for name, fields in plain.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceCorruptError(f"{path}: the safetensors header is damaged: {error}") from None
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_layout(path, entries, 8 + length, total)
    return entries, metadata


def _entry(name: str, fields: Mapping[str, Any], data_start: int) -> HeaderEntry:
    begin, end = fields["data_offsets"]
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    if dtype not in ITEM_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    if begin < 0 or end - begin != num_bytes(dtype, math.prod(shape)):
        raise ValueError(f"{name}: bytes {begin}..{end} do not hold {dtype} {list(shape)}")
    return HeaderEntry(name, dtype, shape, data_start + begin, end - begin)


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
