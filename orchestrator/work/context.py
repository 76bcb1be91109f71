"""The context of a step's function: a store, a place to write, and ways to report."""

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
from orchestrator.scheduling.checking import InputChecks
from orchestrator.stores.file import FileStore
from orchestrator.stores.store import ObjectMissingError, Store, Writer

Unit = Literal["bytes", "steps"]


@dataclass
class Context:
    """Context of one attempt of one step."""

    store: Store
    prefix: str
    """Key prefix of this attempt's outputs."""
    scratch: Path
    """Folder of this attempt only, removed when it ends."""
    report: Callable[[str, int, int, Unit], None]
    """Report progress: phase, done, total, unit."""
    log: Callable[[str], None]
    """Append a line to the step's log."""
    tools: dict[str, str] = field(default_factory=dict)
    """Versions of the tools that the step used; the step fills it."""
    outputs: list[Output] = field(default_factory=list)
    makers: Mapping[str, str] = field(default_factory=dict)
    """Digest of the step that wrote an input, by the input's key."""
    checks: InputChecks = field(default_factory=InputChecks)
    consumed: list[Consumed] = field(default_factory=list)
    """Outputs that the step fetched."""
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    """Actions to run once the outcome is committed: they remove what only later attempts would have needed."""

    @contextmanager
    def output(self, name: str, num_bytes: int | None = None, *, chunked: bool = False) -> Iterator[HashingWriter]:
        """Stream an output, which is recorded when the block ends. A block that raises leaves nothing.

        `chunked`: also hash the output's chunks, for files that will be published. This doubles the cost of hashing.
        """
        key = self.prefix + name
        with self.store.writer(key, num_bytes) as raw:
            writer = HashingWriter(raw, chunked=chunked)
            yield writer
            self.checks.settle()  # no output made from damaged bytes gets a name
        self.outputs.append(
            Output(name=name, key=key, num_bytes=writer.num_bytes, sha256=writer.sha256, chunks=writer.chunk_digests)
        )

    def fetch(self, output: Output) -> Path:
        """Return an input as a local file: in place and hashed meanwhile for a folder store, else copied to scratch.

        Raises DamagedOutputError when a copy is gone or differs from its commit. For files read in place, `checks` raises it.
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
    """Bytes that several writers share, perhaps on several threads: the files of a stage's ranks begin alike.

    Their headers are the same, and the embedding comes first, whole in every rank: its hash is computed once. From the first
    sharded tensor on, the ranks' hashes differ and nothing is shared.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._lock = threading.Lock()
        self._histories: dict[bytes, _History] = {}

    def hashed_after(self, before: hashlib._Hash) -> hashlib._Hash:
        """Return the hash `before`, continued with the block; computed once for writers with equal bytes so far."""
        so_far = before.digest()
        with self._lock:
            history = self._histories.setdefault(so_far, _History())
        with history.lock:  # writers with the same bytes so far wait for this hash; others do not
            if history.hashed is None:
                hashed = before.copy()
                hashed.update(self.data)
                history.hashed = hashed
            return history.hashed.copy()


@dataclass
class _History:
    """Writers of a shared block whose earlier bytes are the same."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    hashed: hashlib._Hash | None = None
    """Hash with the block; None until a writer has computed it."""


class HashingWriter:
    """Writer that computes sha256 while writing, so that nothing is read back to be hashed."""

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
        """Write a shared block. It is hashed once for all writers with the same bytes so far."""
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
        """Digests of the chunks so far; empty unless `chunked`."""
        return self._chunks.digests() if self._chunks is not None else ()


def download(store: Store, key: str, num_bytes: int, sha256: str, target: Path) -> None:
    """Copy an object to `target` and verify it. The name appears only when every byte is right and on disk.

    Large objects bypass the page cache, as in a file store's writer. Bytes damaged on the way are read once more. Raises
    DigestError, StoreError, and then leaves nothing.
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
