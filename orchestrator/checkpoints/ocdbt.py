"""The keys of an OCDBT database in a folder of any source, and where their values lie. Values are not read.

OCDBT is TensorStore's B+tree of keys in files: manifest.ocdbt names the root, nodes and values are ranges of the files in d/.
TensorStore decodes the manifest and the nodes; their bytes are read as ranges of the source.
Source: tensorstore/kvstore/ocdbt in TensorStore's documentation, and tensorstore.ocdbt.dump.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from orchestrator.base.errors import SourceCorruptError, SourceMissingError, abbreviated
from orchestrator.stores.source import SourceFolder

MANIFEST = "manifest.ocdbt"
_MOST_DEPTH = 16
_ADVICE = "Copy the checkpoint again."


@dataclass(frozen=True, slots=True)
class Value:
    """Place of a value: a range of a file, or of the node that holds it."""

    file: str
    offset: int
    num_bytes: int
    key: str = ""
    """Key within the node; empty: the range is the value."""
    data: bytes = b""
    """The value, if a node holds it."""


def read_keys(folder: SourceFolder, root: str) -> dict[str, Value]:
    """Return every key of the database in the subfolder `root` ("" or "name/"). Raises SourceCorruptError, SourceMissingError."""
    names = set(folder.names())
    manifest = _dump({MANIFEST: folder.read(root + MANIFEST)}, None, f"{folder.url}/{root}{MANIFEST}")
    latest: dict[str, Any] = max(manifest["versions"], key=lambda version: version["generation_number"], default={})
    location = latest.get("root", {}).get("location")
    if location is None:
        raise SourceCorruptError(f"{folder.url}/{root}{MANIFEST} names no tree: nothing was saved", _ADVICE)
    return dict(_walk(folder, root, location, "", names, _MOST_DEPTH))


def _walk(folder: SourceFolder, root: str, location: str, prefix: str, names: set[str], depth: int) -> Iterator[tuple[str, Value]]:
    """Yield the keys below a node."""
    node = _place(folder, root, location, names)
    if not depth:
        raise SourceCorruptError(f"{folder.url}/{node.file}: the B-tree is deeper than {_MOST_DEPTH} nodes", _ADVICE)
    data = folder.read(node.file, node.offset, node.offset + node.num_bytes)
    for entry in node_entries(data, f"{folder.url}/{node.file}"):
        key = _text(entry["key"])
        if "location" in entry:
            below = prefix + _text(entry.get("subtree_common_prefix", b""))
            yield from _walk(folder, root, entry["location"], below, names, depth - 1)
        elif "inline_value" in entry:
            yield prefix + key, Value(node.file, node.offset, node.num_bytes, key, _bytes(entry["inline_value"]))
        else:
            yield prefix + key, _place(folder, root, entry["indirect_value"], names)


def node_entries(data: bytes, where: str) -> list[dict[str, Any]]:
    """Decode a node of the B-tree. Raises SourceCorruptError."""
    entries: list[dict[str, Any]] = _dump({"node": data}, f"btreenode::node:0:{len(data)}", where)["entries"]
    return entries


def inline_value(data: bytes, key: str, where: str) -> bytes:
    """Return the value that the node `data` holds under `key`. Raises SourceCorruptError."""
    for entry in node_entries(data, where):
        if _text(entry["key"]) == key and "inline_value" in entry:
            return _bytes(entry["inline_value"])
    raise SourceCorruptError(f"{where}: the node lacks {abbreviated(key, 100)}", _ADVICE)


def _dump(files: Mapping[str, bytes], node: str | None, where: str) -> dict[str, Any]:
    """Let TensorStore decode a manifest or a node. Raises SourceCorruptError."""
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "memory"}).result()
    try:
        for name, data in files.items():
            store.write(name, data).result()
        found: dict[str, Any] = ts.ocdbt.dump(store, *([] if node is None else [node])).result()
        return found
    except ValueError as error:
        raise SourceCorruptError(f"{where} is truncated or damaged: {abbreviated(str(error), 200)}", _ADVICE) from None


def _place(folder: SourceFolder, root: str, location: str, names: set[str]) -> Value:
    """Parse kind:base:path:offset:bytes. Raises SourceCorruptError, SourceMissingError."""
    try:
        _, base, path, offset, size = location.split(":")
        name, value = root + unquote(base) + unquote(path), (int(offset), int(size))
    except ValueError:
        raise SourceCorruptError(f"{folder.url}/{root}{MANIFEST}: {abbreviated(location, 100)!r} is no place in a file") from None
    if name not in names:
        raise SourceMissingError(f"{folder.url} lacks {abbreviated(name, 100)}, which {root}{MANIFEST} refers to", _ADVICE)
    return Value(name, *value)


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _text(key: bytes | str) -> str:
    return key if isinstance(key, str) else key.decode(errors="backslashreplace")
