"""Place the large files of a release: copy what the steps wrote, and read every copy back.

Engines, weights and graphs are copied within the store, on the server where it can. Nothing is stored twice: the portable part and
the checkpoint hold the same weights.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.base.digest import ChunkHasher
from orchestrator.base.errors import DamagedOutputError, DigestError
from orchestrator.planning.options import VerifyOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome, Output
from orchestrator.releases.describe import describe_rank
from orchestrator.releases.manifest import Chunks, FileRecord, RankRecord, Role, release_prefix
from orchestrator.releases.proof import check_miniature, check_networks
from orchestrator.releases.reference_numbers import REFERENCE, shortened
from orchestrator.scheduling.consumption import outdated
from orchestrator.stores.store import ObjectMissingError, Store

_TYPES: dict[Role, str] = {
    "engine": "application/vnd.nvidia.tensorrt.engine",
    "weights": "application/vnd.safetensors",
    "graph": "application/vnd.onnx",
}
BUILD_DIGITS = 12
_READERS = 4
"""Objects that are read back at once."""


@dataclass(frozen=True)
class Placed:
    """The large files of a release, in place and read back."""

    folder: str
    """Folder of this attempt, relative to the release, with a trailing '/'."""
    ranks: tuple[RankRecord, ...]
    graphs: tuple[FileRecord, ...]
    """Portable graphs in the order of the stages."""
    reference: bytes | None = None
    """Content of reference.safetensors; None: nothing was verified."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An output of a step that becomes a file of the release."""

    output: Output
    path: str
    role: Role
    rank: int | None = None


def place(store: Store, plan: Plan, outcomes: Mapping[str, Outcome]) -> Placed:
    """Copy the outputs that the release holds, and read them back.

    Raises DamagedOutputError, with the key of the step's output, for a copy that differs from what its step wrote; DigestError
    when the outcomes do not belong together; VerificationError when a published network is not the verified one.
    """
    check_miniature(plan, outcomes)
    check_networks(plan, outcomes)
    reasons = outdated(plan, outcomes)
    if reasons:
        raise DigestError(next(iter(reasons.values())), "Run the build again: the steps concerned run again.")
    release = plan.spec.release
    prefix = release_prefix(release.name, release.version)
    folder = f"{plan.build_key[:BUILD_DIGITS]}-{uuid.uuid4().hex[:8]}/"
    wanted = list(_wanted(plan, outcomes))
    with ThreadPoolExecutor(_READERS, "read-back") as pool:
        records = list(pool.map(lambda item: _place(store, prefix, folder, item), wanted))
    files = list(zip(wanted, records, strict=True))
    engines = [record for item, record in files if item.role == "engine"]
    ranks = []
    for step, engine in zip(plan.of_kind(Kind.BUILD), engines, strict=True):
        described = describe_rank(plan, outcomes[step.digest], engine)
        weights = tuple(record for item, record in files if item.role == "weights" and item.rank == described.rank)
        ranks.append(described.model_copy(update={"weights": weights}))
    graphs = tuple(record for item, record in files if item.role == "graph")
    return Placed(folder, tuple(ranks), graphs, _reference(store, plan, outcomes))


def _reference(store: Store, plan: Plan, outcomes: Mapping[str, Outcome]) -> bytes | None:
    """Return the reference numbers of a verified build; None: it was not, or its reference is gone. Raises DamagedOutputError."""
    verified, reference = next(plan.of_kind(Kind.VERIFY), None), next(plan.of_kind(Kind.REFERENCE), None)
    if verified is None or reference is None or reference.digest not in outcomes:
        return None
    options = VerifyOptions.model_validate(verified.options)
    return shortened(store, outcomes[reference.digest].output(REFERENCE), options.decode_steps, options.tolerance)


def _wanted(plan: Plan, outcomes: Mapping[str, Outcome]) -> Iterator[_Wanted]:
    """Yield the outputs that the release holds, by step in the plan's order."""
    for step in plan.steps:
        if step.kind is Kind.BUILD:
            (output,) = outcomes[step.digest].outputs
            yield _Wanted(output, output.name, "engine")
        elif step.kind is Kind.EXPORT:
            (output,) = outcomes[step.digest].outputs
            yield _Wanted(output, f"portable/{output.name}", "graph")
        elif step.kind is Kind.CONVERT and plan.spec.release.has_weights:
            for output in outcomes[step.digest].outputs:
                yield _Wanted(output, f"checkpoint/{output.name}", "weights", rank_of_shard(output.name))


def rank_of_shard(name: str) -> int:
    """Return the rank whose shard has this name: rank3.safetensors or rank3-00001-of-00002.safetensors."""
    return int(name.removeprefix("rank").partition(".")[0].partition("-")[0])


def _place(store: Store, prefix: str, folder: str, item: _Wanted) -> FileRecord:
    output, key = item.output, folder + item.output.name
    try:
        store.copy(output.key, prefix + key)
    except ObjectMissingError as error:
        raise DamagedOutputError(f"{output.key} is gone", key=output.key) from error
    # Shards are hashed by chunks here only, because most builds do not publish them.
    chunks = _read_back(store, prefix + key, output, chunked=not output.chunks)
    return FileRecord(
        path=item.path,
        key=key,
        role=item.role,
        media_type=_TYPES[item.role],
        num_bytes=output.num_bytes,
        sha256=output.sha256,
        chunks=Chunks(sha256=chunks),
    )


def damaged(store: Store, outputs: Iterable[Output]) -> DamagedOutputError | None:
    """Return an error for the first output whose bytes differ from what was written; None: all are right."""

    def damage(output: Output) -> DamagedOutputError | None:
        try:
            _read_back(store, output.key, output, chunked=False)
        except DamagedOutputError as error:
            return error
        return None

    with ThreadPoolExecutor(_READERS, "read-back") as pool:
        return next(filter(None, pool.map(damage, list(outputs))), None)


def _read_back(store: Store, key: str, output: Output, *, chunked: bool) -> tuple[str, ...]:
    """Read an object and compare it with `output`. Raises DamagedOutputError.

    Returns the digests of its chunks, which are computed if `chunked`, else those of the output.
    """
    whole, chunks = hashlib.sha256(), ChunkHasher()
    try:
        for block in store.blocks(key):
            whole.update(block)
            if chunked:
                chunks.update(block)
    except ObjectMissingError:
        raise DamagedOutputError(f"{key} is gone", key=output.key) from None
    if whole.hexdigest() != output.sha256:
        raise DamagedOutputError(
            f"{key} in {store.url} is not what was written: sha256 {whole.hexdigest()}, expected {output.sha256}", key=output.key
        )
    return chunks.digests() if chunked else output.chunks
