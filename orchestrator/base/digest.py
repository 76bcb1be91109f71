"""Content addresses. A digest is the lower-case hexadecimal sha256 of bytes, of their chunks, or of a value's canonical JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CHUNK_BYTES = 64 * 2**20
"""Size of a chunk. Published files have a digest per chunk, so that each chunk is fetched, verified and resumed separately."""


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON of `value`: sorted keys, no spaces, UTF-8, floats as their shortest round-trip text.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_bytes(data: bytes) -> str:
    """Return the sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ChunkHasher:
    """sha256 of every `chunk_bytes` of a stream, whatever the sizes of its updates. The last chunk may be shorter."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._hash = hashlib.sha256()
        self._filled = 0
        self._done: list[str] = []

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[: self._chunk_bytes - self._filled]
            self._hash.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == self._chunk_bytes:
                self._done.append(self._hash.hexdigest())
                self._hash, self._filled = hashlib.sha256(), 0

    def digests(self) -> tuple[str, ...]:
        """Return the digest of every chunk so far. Empty before the first byte."""
        return (*self._done, self._hash.hexdigest()) if self._filled else tuple(self._done)


def chunk_digests(data: bytes) -> tuple[str, ...]:
    """Return the digests of the chunks of `data`."""
    hasher = ChunkHasher()
    hasher.update(data)
    return hasher.digests()
