"""Arrays of zarr, versions 2 and 3, as TensorStore and Orbax write them: where each chunk lies, and how it is compressed.

Source: the zarr specifications (v2; v3 core, sharding-indexed).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from orchestrator.base.dtypes import num_bytes
from orchestrator.base.errors import DtypeError, QuantizationError, SourceCorruptError, SourceMissingError, abbreviated
from orchestrator.checkpoints.json_text import json_value
from orchestrator.checkpoints.ocdbt import Value
from orchestrator.model.checkpoint import ChunkedArray

METADATA = (".zarray", "zarr.json")
_DTYPES = {
    "<f2": "F16", "float16": "F16", "<f4": "F32", "float32": "F32", "<f8": "F64", "float64": "F64", "bfloat16": "BF16",
}  # fmt: skip
_QUANTIZED = ("|i1", "|u1", "int8", "uint8", "int4", "uint4", "float8", "int2", "float4")
_AGAIN = "Save it again with Orbax's defaults."
_COPY = "Copy the checkpoint again."

Read = Callable[[Value, int, int], bytes]
"""Returns bytes [begin, end) of a value."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    """Metadata of an array."""

    dtype: str
    shape: Shape
    stored: Shape
    """Shape of what a key holds: a chunk, or a shard of chunks."""
    chunk: Shape
    codec: Literal["none", "zstd"]
    key: Callable[[Shape], str]
    """Grid position of what a key holds -> key."""


def read_array(where: str, metadata: bytes, values: Mapping[str, Value], files: Mapping[str, int], read: Read) -> ChunkedArray:
    """Return the array whose keys are `values`. `files`: name -> number.

    Raises SourceCorruptError, SourceMissingError, DtypeError; QuantizationError for integers and 8-bit floats.
    """
    layout = _layout(where, metadata)
    split = tuple(stored // chunk for stored, chunk in zip(layout.stored, layout.chunk, strict=True))
    found: dict[Shape, tuple[tuple[int, int, int], tuple[str, int, int] | None]] = {}
    for position in _grid(layout.shape, layout.stored):
        value = values.get(layout.key(position))
        if value is None:
            raise SourceMissingError(f"{where} lacks the chunk {layout.key(position)}", _COPY)
        for inner, begin, end in _chunks(where, value, layout, split, read):
            at = tuple(outer * count + number for outer, count, number in zip(position, split, inner, strict=True))
            whole = (files[value.file], value.offset, value.num_bytes)
            found[at] = (whole, (value.key, begin, end)) if value.key else ((whole[0], value.offset + begin, end - begin), None)
    order = list(_grid(layout.shape, layout.chunk))
    missing = next((position for position in order if position not in found), None)
    if missing is not None:
        raise SourceCorruptError(f"{where} lacks the chunk {missing} within its shard", _COPY)
    return ChunkedArray(
        layout.dtype,
        layout.shape,
        layout.chunk,
        layout.codec,
        tuple(found[position][0] for position in order),
        tuple((number, *held) for number, position in enumerate(order) if (held := found[position][1]) is not None),
    )


def _grid(shape: Shape, chunk: Shape) -> Iterator[Shape]:
    return itertools.product(*(range(-(-size // step)) for size, step in zip(shape, chunk, strict=True)))


def _chunks(where: str, value: Value, layout: _Layout, split: Shape, read: Read) -> Iterator[tuple[Shape, int, int]]:
    """Yield position, first byte and end of the chunks within a value: itself, or those that the index of a shard lists."""
    if layout.stored == layout.chunk and not _is_sharded(layout):
        yield (0,) * len(split), 0, len(value.data) if value.key else value.num_bytes
        return
    total = len(value.data) if value.key else value.num_bytes
    count = math.prod(split)
    size = 16 * count + 4  # two 64-bit numbers per chunk, and a CRC of 32 bits
    if total < size:
        raise SourceCorruptError(f"{where}: a shard of {total} bytes has no index", _COPY)
    index = read(value, total - size, total)
    for number, position in enumerate(itertools.product(*map(range, split))):
        begin, length = (int.from_bytes(index[16 * number + at : 16 * number + at + 8], "little") for at in (0, 8))
        if begin == length == 2**64 - 1:
            continue  # a chunk that was not stored
        if begin + length > total - size:
            raise SourceCorruptError(f"{where}: the index of a shard is damaged", _COPY)
        yield position, begin, begin + length


def _is_sharded(layout: _Layout) -> bool:
    return isinstance(layout, _Sharded)


@dataclass(frozen=True)
class _Sharded(_Layout):
    """Metadata of an array in shards."""


def _layout(where: str, metadata: bytes) -> _Layout:
    """Parse .zarray or zarr.json. Raises SourceCorruptError, DtypeError, QuantizationError."""
    plain = json_value(metadata, where)
    try:
        found = _version2(where, plain) if plain["zarr_format"] == 2 else _version3(where, plain)
        parts = (found.shape, found.stored, found.chunk)
        sound = all(len(part) == len(found.shape) and all(type(size) is int for size in part) for part in parts)
        sound = sound and all(0 <= size < 2**48 for size in found.shape) and all(size > 0 for size in found.chunk)
        sound = sound and all(stored % chunk == 0 for stored, chunk in zip(found.stored, found.chunk, strict=True))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise SourceCorruptError(f"{where} has damaged metadata: {abbreviated(str(error), 100)}", _COPY) from None
    if not sound or num_bytes(found.dtype, math.prod(found.chunk)) >= 2**48:
        raise SourceCorruptError(f"{where} has a malformed shape or chunk shape", _COPY)
    return found


def _version2(where: str, plain: dict[str, Any]) -> _Layout:
    compressor = plain["compressor"]
    name = "none" if compressor is None else compressor["id"]
    if plain.get("filters") or plain.get("order", "C") != "C":
        raise SourceCorruptError(f"{where} has filters or Fortran order, which are not read", _AGAIN)
    separator = str(plain.get("dimension_separator", "."))
    shape, chunk = tuple(plain["shape"]), tuple(plain["chunks"])
    return _Layout(
        _dtype(where, plain["dtype"]), shape, chunk, chunk, _codec(where, name),
        lambda position: separator.join(map(str, position)) or "0",
    )  # fmt: skip


def _version3(where: str, plain: dict[str, Any]) -> _Layout:
    shape, outer = tuple(plain["shape"]), tuple(plain["chunk_grid"]["configuration"]["chunk_shape"])
    encoding = plain["chunk_key_encoding"]
    separator = str(encoding.get("configuration", {}).get("separator", "/"))
    if plain["chunk_grid"]["name"] != "regular" or encoding["name"] != "default":
        raise SourceCorruptError(f"{where} has a chunk grid or key encoding that is not read", _AGAIN)

    def key(position: Shape) -> str:
        return separator.join(("c", *map(str, position)))

    dtype, codecs = _dtype(where, plain["data_type"]), plain["codecs"]
    if len(codecs) == 1 and codecs[0]["name"] == "sharding_indexed":
        shard = codecs[0]["configuration"]
        index = [codec["name"] for codec in shard["index_codecs"]]
        if index != ["bytes", "crc32c"] or shard.get("index_location", "end") != "end":
            raise SourceCorruptError(f"{where} has shards with an index that is not read", _AGAIN)
        return _Sharded(dtype, shape, outer, tuple(shard["chunk_shape"]), _codec(where, *_names(where, shard["codecs"])), key)
    return _Layout(dtype, shape, outer, outer, _codec(where, *_names(where, codecs)), key)


def _names(where: str, codecs: list[dict[str, Any]]) -> list[str]:
    """Return the names of the codecs after `bytes`."""
    first = codecs[0]
    if first["name"] != "bytes" or first.get("configuration", {}).get("endian", "little") != "little":
        raise SourceCorruptError(f"{where} has elements in an order that is not read: {first}", _AGAIN)
    return [codec["name"] for codec in codecs[1:]]


def _codec(where: str, *names: str) -> Literal["none", "zstd"]:
    name = names[0] if names else "none"
    if len(names) > 1 or name not in ("none", "zstd"):
        raise SourceCorruptError(f"{where} is compressed with {', '.join(names)}, which is not read", _AGAIN)
    return cast('Literal["none", "zstd"]', name)


def _dtype(where: str, name: Any) -> str:
    """Return safetensors' name. Raises DtypeError, QuantizationError."""
    shown = abbreviated(str(name), 40)
    if isinstance(name, str) and name in _DTYPES:
        return _DTYPES[name]
    if isinstance(name, str) and name.startswith(_QUANTIZED):
        raise QuantizationError(f"{where} is quantized ({shown})", "Build from the checkpoint that was not quantized.")
    raise DtypeError(f"{where} has dtype {shown}, which is not read", "Save the weights in bfloat16, float16 or float32.")
