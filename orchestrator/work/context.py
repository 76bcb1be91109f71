"""What every step's function is given besides its task: a store, a place to write, and ways to report."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.base.digest import ChunkHasher
from orchestrator.base.errors import DamagedOutputError, DigestError
from orchestrator.planning.steps import Consumed, Output
from orchestrator.run.checking import InputChecks
from orchestrator.stores.file import FileStore
from orchestrator.stores.store import ObjectMissingError, Store, Writer

Unit = Literal["bytes", "steps"]


@dataclass
class Context:
    """Of one attempt of one step."""

    store: Store
    prefix: str
    """Key prefix of this attempt's outputs."""
    scratch: Path
    """A folder of this attempt's own, removed after it."""
    report: Callable[[str, int, int, Unit], None]
    """Report progress: phase, done, total, unit."""
    log: Callable[[str], None]
    """Append a line to the step's log."""
    tools: dict[str, str] = field(default_factory=dict)
    """Versions of what the step used; filled by it."""
    outputs: list[Output] = field(default_factory=list)
    makers: Mapping[str, str] = field(default_factory=dict)
    """Digest of the step that wrote an input, by its key."""
    checks: InputChecks = field(default_factory=InputChecks)
    consumed: list[Consumed] = field(default_factory=list)
    """Outputs that were fetched."""
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    """Called when the outcome is committed: what only later attempts would have needed is removed."""

    @contextmanager
    def output(self, name: str, num_bytes: int | None = None, *, chunked: bool = False) -> Iterator[HashingWriter]:
        """Stream an output; it is recorded when the block ends well, and leaves nothing when it raises.

        `chunked`: with the digests of its chunks too, for what is going to be published; it doubles the cost of hashing.
        """
        key = self.prefix + name
        with self.store.writer(key, num_bytes) as raw:
            writer = HashingWriter(raw, chunked=chunked)
            yield writer
            self.checks.settle()  # nothing made from damaged bytes gets a name
        self.outputs.append(
            Output(name=name, key=key, num_bytes=writer.num_bytes, sha256=writer.sha256, chunks=writer.chunk_digests)
        )

    def fetch(self, output: Output) -> Path:
        """An input as a file of this machine: where it lies, and hashed while the step reads it, or copied to scratch and checked.

        Raises DamagedOutputError when the bytes are not those that were committed; of a file that lies here, `checks` does.
        """
        consumed = Consumed(step=self.makers.get(output.key, ""), name=output.name, sha256=output.sha256)
        if consumed not in self.consumed:
            self.consumed.append(consumed)
        local = self.store.local_path(output.key)
        if local is not None:
            self.checks.begin(output, local)
            return local
        target = self.scratch / output.sha256[:16] / output.name
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(self.store, output.key, output.num_bytes, output.sha256, target)
        except ObjectMissingError as error:
            raise DamagedOutputError(f"{output.key} is gone", key=output.key) from error
        except DigestError as error:
            raise DamagedOutputError(error.message, key=output.key) from error
        return target


class SharedBlock:
    """Bytes that several writers take, perhaps on several threads: the ranks of a stage begin alike.

    Their headers are the same, and the embedding comes first, whole in every rank: its hash is computed once. After the first
    tensor that is cut, the ranks' hashes differ and nothing is shared any more.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._lock = threading.Lock()
        self._histories: dict[bytes, _History] = {}

    def hashed_after(self, before: hashlib._Hash) -> hashlib._Hash:
        """The hash of what `before` has hashed and then the block. Equal digests so far mean equal bytes so far."""
        so_far = before.digest()
        with self._lock:
            history = self._histories.setdefault(so_far, _History())
        with history.lock:  # who writes the same waits for the hash; who writes something else does not
            if history.hashed is None:
                hashed = before.copy()
                hashed.update(self.data)
                history.hashed = hashed
            return history.hashed.copy()


@dataclass
class _History:
    """Writers of a shared block whose bytes before it are the same."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    hashed: hashlib._Hash | None = None
    """With the block; None until one of them has hashed it."""


class HashingWriter:
    """Computes sha256 while writing, so that no byte is read back to be hashed."""

    def __init__(self, raw: Writer, *, chunked: bool = False) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()
        self._chunks = ChunkHasher() if chunked else None
        self.num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._raw.write(data)
        self._hash.update(data)
        if self._chunks is not None:
            self._chunks.update(data)
        self.num_bytes += memoryview(data).nbytes

    def write_shared(self, block: SharedBlock) -> None:
        """Write what other writers write too; hashed once for all of them that have written the same bytes so far."""
        self._raw.write(block.data)
        self._hash = block.hashed_after(self._hash)
        if self._chunks is not None:
            self._chunks.update(block.data)
        self.num_bytes += block.data.nbytes

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def chunk_digests(self) -> tuple[str, ...]:
        """Of what was written so far; empty unless asked for."""
        return self._chunks.digests() if self._chunks is not None else ()


def download(store: Store, key: str, num_bytes: int, sha256: str, target: Path) -> None:
    """Copy an object to `target`, verified while writing; the name appears only when every byte is right and on disk.

    Large ones bypass the page cache, as a file store's writer does. Bytes damaged on their way are read once more. Raises
    DigestError, StoreError, and leaves nothing.
    """
    folder = FileStore(target.parent.resolve().as_uri())
    for last in (False, True):
        try:
            _download_once(store, key, num_bytes, sha256, folder.writer(target.name, num_bytes))
        except DigestError:
            if last:
                raise
        else:
            return


def _download_once(store: Store, key: str, num_bytes: int, sha256: str, writer: Writer) -> None:
    hasher = hashlib.sha256()
    written = 0
    with writer, ThreadPoolExecutor(1, "hash") as pool:
        for block in store.blocks(key):
            hashed = pool.submit(hasher.update, block)  # beside the write: each takes about as long as the other
            writer.write(block)
            hashed.result()
            written += len(block)
        if (hasher.hexdigest(), written) != (sha256, num_bytes):
            raise DigestError(f"{key} in {store.url} is not what was written: sha256 {hasher.hexdigest()}, expected {sha256}")


def file_sha256(path: Path) -> str:
    """sha256 of a file, in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
