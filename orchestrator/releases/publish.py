"""Publish a finished build: objects first, then the signature, the manifest last and only if it is new.

    releases/<name>/<version>/manifest.json
    releases/<name>/<version>/signatures/<digest of the manifest>.sig
    releases/<name>/<version>/<build>-<id>/...   objects of this attempt; the folder begins with the build key

Every object of the release is read back after it was copied or written and before the manifest is signed, whoever wrote it. An
engine that reads back wrong makes its step run again.

Two builds that publish one version at once write to different folders. The first manifest wins, and always names its own objects.
No key is ever reused, so `collect` can remove what a dead attempt left. A signature is found by the digest of the signed manifest,
so the loser's signature has no effect.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.base.digest import ChunkHasher, chunk_digests, digest_bytes
from orchestrator.base.errors import (
    DamagedOutputError,
    DigestError,
    ReleaseExistsError,
    SignatureError,
    SourceCorruptError,
    StoreError,
)
from orchestrator.model.config import to_trtllm
from orchestrator.planning.options import VerifyOptions
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome, Output
from orchestrator.releases import signing
from orchestrator.releases.describe import describe, describe_rank
from orchestrator.releases.differences import differences, times_back
from orchestrator.releases.manifest import (
    MANIFEST,
    Chunks,
    FileRecord,
    Manifest,
    RankRecord,
    Role,
    parse_manifest,
    release_prefix,
    signature_key,
)
from orchestrator.releases.proof import check_miniature, check_networks
from orchestrator.releases.reference_numbers import REFERENCE, shortened
from orchestrator.scheduling.consumption import outdated
from orchestrator.stores import open_source
from orchestrator.stores.confined import read_companion
from orchestrator.stores.store import ObjectExistsError, ObjectMissingError, Store

_ENGINE_TYPE = "application/vnd.nvidia.tensorrt.engine"
_BUILD_DIGITS = 12
_BLOCK_BYTES = 8 * 2**20
_READERS = 4
"""Objects that are read back at once."""


def check_free(store: Store, plan: Plan, sign_key: Path | None = None) -> Manifest | None:
    """Return the release if this very build is already published; None when the version is free.

    Raises ReleaseExistsError when another build has it, and SignatureError when it is this build's but not signed with `sign_key`:
    signing later would vouch for stored bytes that nobody saw being made.
    """
    release, build_key = plan.spec.release, plan.build_key
    prefix = release_prefix(release.name, release.version)
    try:
        data = store.get(prefix + MANIFEST)
    except ObjectMissingError:
        return None
    existing = parse_manifest(data, f"{store.url}/{prefix}{MANIFEST}")
    if existing.build_key != build_key:
        raise ReleaseExistsError(
            f"{release.name} {release.version} is already published in {store.url} by another build "
            f"(build key {existing.build_key[:_BUILD_DIGITS]}, this one is {build_key[:_BUILD_DIGITS]}). "
            f"Different: {'; '.join(differences(existing, plan))}",
            _advice(times_back(existing, plan)),
        )
    if sign_key is not None and not _is_signed(store, prefix, data, sign_key):
        raise SignatureError(
            f"{release.name} {release.version} is already published in {store.url}, and not signed with {sign_key}",
            "Raise release.version in the spec: no step is repeated.",
        )
    return existing


def _advice(commands: str) -> str:
    if not commands:
        return ""
    return (
        f"Raise release.version in the spec. If the files are the same, restore their times: {commands}. With a SHA256SUMS "
        "file beside the weights (sha256sum *.safetensors > SHA256SUMS), times no longer matter."
    )


def _is_signed(store: Store, prefix: str, manifest: bytes, sign_key: Path) -> bool:
    try:
        signature = store.get(prefix + signature_key(digest_bytes(manifest)))
    except ObjectMissingError:
        return False
    return signing.is_signed_by(signature, sign_key)


@dataclass(frozen=True)
class Engines:
    """The ranks of a release whose engines are in place and were read back."""

    folder: str
    """Folder of this attempt, relative to the release, with a trailing '/'."""
    ranks: tuple[RankRecord, ...]
    reference: bytes | None = None
    """Content of reference.safetensors; None: nothing was verified."""


def place_engines(store: Store, plan: Plan, outcomes: Mapping[str, Outcome]) -> Engines:
    """Copy the engines into the release and read them back.

    Raises DamagedOutputError, with the key of the step's output, for an engine that differs from what its step wrote; DigestError
    when the outcomes do not belong together; VerificationError when the compiled networks are not the verified ones.
    """
    check_miniature(plan, outcomes)
    check_networks(plan, outcomes)
    reasons = outdated(plan, outcomes)
    if reasons:
        raise DigestError(next(iter(reasons.values())), "Run the build again: the steps concerned run again.")
    release = plan.spec.release
    prefix = release_prefix(release.name, release.version)
    folder = f"{plan.build_key[:_BUILD_DIGITS]}-{uuid.uuid4().hex[:8]}/"
    built = [outcomes[step.digest] for step in plan.of_kind(Kind.BUILD)]
    with ThreadPoolExecutor(_READERS, "read-back") as pool:
        ranks = pool.map(lambda outcome: _publish_rank(store, prefix, folder, plan, outcome), built)
        return Engines(folder, tuple(ranks), _reference(store, plan, outcomes))


def _reference(store: Store, plan: Plan, outcomes: Mapping[str, Outcome]) -> bytes | None:
    """Return the reference numbers of a build that was verified; None: it was not. Raises DamagedOutputError."""
    verified, references = next(plan.of_kind(Kind.VERIFY), None), list(plan.of_kind(Kind.REFERENCE))
    if verified is None or not references:
        return None
    options = VerifyOptions.model_validate(verified.options)
    return shortened(store, outcomes[references[0].digest].output(REFERENCE), options.decode_steps, options.tolerance)


def publish(
    store: Store,
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    engines: Engines,
    sign_key: Path | None = None,
    report: Callable[[Manifest], bytes] | None = None,
) -> Manifest:
    """Write small files beside the engines, sign, then commit the manifest.

    `report` renders the page published with the release, from the manifest without that page. Returns the published manifest: ours,
    or that of the same build if another process was faster. Raises ReleaseExistsError when a different build was faster,
    SignatureError when `sign_key` cannot sign.
    """
    release, folder = plan.spec.release, engines.folder
    prefix = release_prefix(release.name, release.version)
    shared = tuple(_publish_shared(store, prefix, folder, plan))
    manifest = describe(plan, outcomes, engines.ranks, shared)
    if engines.reference is not None:
        numbers = _put(store, prefix, folder, REFERENCE, "reference", "application/octet-stream", engines.reference)
        manifest = manifest.model_copy(update={"reference": numbers})
    if report is not None:
        page = _put(store, prefix, folder, "report.html", "report", "text/html", report(manifest))
        manifest = manifest.model_copy(update={"documents": (page,)})
    data = manifest.to_json()
    if sign_key is not None:
        digests = signed_digests(manifest, data)
        _put_checked(store, prefix + signature_key(digests[MANIFEST]), signing.sign(digests, release.name, sign_key))
    try:
        store.put(prefix + MANIFEST, data, create=True)
    except ObjectExistsError:
        return check_free(store, plan, sign_key) or manifest
    _check_small(store, prefix + MANIFEST, data)
    return manifest


def damaged(store: Store, outputs: Iterable[Output]) -> DamagedOutputError | None:
    """Return an error for the first output whose bytes differ from what was written; None: all are right."""
    with ThreadPoolExecutor(_READERS, "read-back") as pool:
        return next(filter(None, pool.map(lambda output: _damage(store, output.key, output), list(outputs))), None)


def _damage(store: Store, key: str, output: Output) -> DamagedOutputError | None:
    """Read an object and compare it with `output`; returns an error or None."""
    hasher = hashlib.sha256()
    try:
        for block in store.blocks(key):
            hasher.update(block)
    except ObjectMissingError:
        return DamagedOutputError(f"{key} is gone", key=output.key)
    if hasher.hexdigest() == output.sha256:
        return None
    return DamagedOutputError(
        f"{key} in {store.url} is not what was written: sha256 {hasher.hexdigest()}, expected {output.sha256}", key=output.key
    )


def signed_digests(manifest: Manifest, data: bytes) -> dict[str, str]:
    """Return the digests that a signature covers: every file of a whole pulled release by path, and the manifest's bytes `data`."""
    return {**{file.path: file.sha256 for file in manifest.all_files()}, MANIFEST: digest_bytes(data)}


def _publish_rank(store: Store, prefix: str, folder: str, plan: Plan, outcome: Outcome) -> RankRecord:
    (output,) = outcome.outputs
    key = folder + output.name
    try:
        store.copy(output.key, prefix + key)
    except ObjectMissingError as error:
        raise DamagedOutputError(f"{output.key} is gone", key=output.key) from error
    damage = _damage(store, prefix + key, output)
    if damage is not None:
        raise damage
    file = FileRecord(
        path=output.name,
        key=key,
        role="engine",
        media_type=_ENGINE_TYPE,
        num_bytes=output.num_bytes,
        sha256=output.sha256,
        chunks=Chunks(sha256=output.chunks or _read_chunks(store, output)),
    )
    return describe_rank(plan, outcome, file)


def _read_chunks(store: Store, output: Output) -> tuple[str, ...]:
    """Read the chunk digests of an engine that was built before chunks were hashed on the way."""
    hasher = ChunkHasher()
    for begin in range(0, output.num_bytes, _BLOCK_BYTES):
        hasher.update(store.get_range(output.key, begin, min(begin + _BLOCK_BYTES, output.num_bytes)))
    return hasher.digests()


def _publish_shared(store: Store, prefix: str, folder: str, plan: Plan) -> list[FileRecord]:
    """Publish the runtime's config and the source's tokenizer and config files."""
    config = {
        "pretrained_config": to_trtllm(plan.inputs.config, plan.topology, plan.inputs.model_quantization),
        "build_config": plan.spec.engine.model_dump(mode="json"),
    }
    data = json.dumps(config, indent=2).encode()
    records = [_put(store, prefix, folder, "config.json", "config", "application/json", data)]
    source = open_source(plan.inputs.source)
    for file in plan.inputs.extra_files:
        content = read_companion(source, file.name)
        if file.identity != "sha256:" + digest_bytes(content):
            raise SourceCorruptError(f"{file.name} of the source was changed during the build", "Run the build again.")
        media_type = "application/json" if file.name.endswith(".json") else "application/octet-stream"
        records.append(_put(store, prefix, folder, f"tokenizer/{file.name}", "tokenizer", media_type, content))
    return records


def _put(store: Store, prefix: str, folder: str, path: str, role: Role, media_type: str, data: bytes) -> FileRecord:
    _put_checked(store, prefix + folder + path, data)
    return FileRecord(
        path=path,
        key=folder + path,
        role=role,
        media_type=media_type,
        num_bytes=len(data),
        sha256=digest_bytes(data),
        chunks=Chunks(sha256=chunk_digests(data)),
    )


def _put_checked(store: Store, key: str, data: bytes) -> None:
    store.put(key, data)
    _check_small(store, key, data)


def _check_small(store: Store, key: str, data: bytes) -> None:
    if store.get(key) != data:
        raise StoreError(f"{key} in {store.url} is not what was just written", "Check the disk, server or network under the store.")
