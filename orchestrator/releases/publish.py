"""Publish a finished build: objects first (placing.py), then the signature, the manifest last and only if it is new.

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

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.base.digest import chunk_digests, digest_bytes
from orchestrator.base.errors import ReleaseExistsError, SignatureError, SourceCorruptError, StoreError
from orchestrator.checkpoints import published_names
from orchestrator.checkpoints.trtllm_files import config_files, shard_indexes
from orchestrator.model.config_trtllm import to_trtllm
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Outcome
from orchestrator.releases import signing
from orchestrator.releases.describe import describe
from orchestrator.releases.differences import differences, times_back
from orchestrator.releases.genai import GENAI_CONFIG, genai_config
from orchestrator.releases.manifest import (
    MANIFEST,
    Chunks,
    FileRecord,
    Manifest,
    Role,
    parse_manifest,
    release_prefix,
    signature_key,
)
from orchestrator.releases.placing import BUILD_DIGITS, Placed
from orchestrator.releases.reference_numbers import REFERENCE
from orchestrator.stores import open_source
from orchestrator.stores.confined import read_companion
from orchestrator.stores.store import ObjectExistsError, ObjectMissingError, Store


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
            f"(build key {existing.build_key[:BUILD_DIGITS]}, this one is {build_key[:BUILD_DIGITS]}). "
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


def publish(
    store: Store,
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    placed: Placed,
    sign_key: Path | None = None,
    report: Callable[[Manifest], bytes] | None = None,
) -> Manifest:
    """Write small files beside the large ones, sign, then commit the manifest.

    `report` renders the page published with the release, from the manifest without that page. Returns the published manifest: ours,
    or that of the same build if another process was faster. Raises ReleaseExistsError when a different build was faster,
    SignatureError when `sign_key` cannot sign.
    """
    release, folder = plan.spec.release, placed.folder
    prefix = release_prefix(release.name, release.version)
    shared = tuple(_publish_shared(store, prefix, folder, plan))
    manifest = describe(plan, outcomes, placed.ranks, shared)
    if placed.reference is not None:
        numbers = _put(store, prefix, folder, REFERENCE, "reference", "application/octet-stream", placed.reference)
        manifest = manifest.model_copy(update={"reference": numbers})
    manifest = manifest.model_copy(update=dict(_parts(store, prefix, folder, plan, placed)))
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


def signed_digests(manifest: Manifest, data: bytes) -> dict[str, str]:
    """Return the digests that a signature covers: every file of a whole pulled release by path, and the manifest's bytes `data`."""
    return {**{file.path: file.sha256 for file in manifest.all_files()}, MANIFEST: digest_bytes(data)}


def _parts(store: Store, prefix: str, folder: str, plan: Plan, placed: Placed) -> Iterator[tuple[str, tuple[FileRecord, ...]]]:
    """Publish the small files of the portable part and of the checkpoint; yields the fields of the manifest that hold them."""
    include = plan.spec.release.include

    def put(path: str, value: Any) -> FileRecord:
        return _put(store, prefix, folder, path, "config", "application/json", json.dumps(value, indent=2).encode())

    if "portable" in include:
        yield "portable", (*placed.graphs, put(f"portable/{GENAI_CONFIG}", genai_config(plan)))
    if "checkpoint" in include:
        yield "checkpoint", tuple(put(f"checkpoint/{name}", value) for name, value in _checkpoint(plan).items())


def _checkpoint(plan: Plan) -> dict[str, Any]:
    """Return the files of a TensorRT-LLM checkpoint beside its shards, by name."""
    inputs = plan.inputs
    files = config_files(inputs.config, plan.topology, inputs.model_quantization)
    return {**shard_indexes(inputs.weights, plan.topology), **files}


def _publish_shared(store: Store, prefix: str, folder: str, plan: Plan) -> list[FileRecord]:
    """Publish the runtime's config and the source's tokenizer and config files."""
    config = {
        "pretrained_config": to_trtllm(plan.inputs.config, plan.topology, plan.inputs.model_quantization),
        "build_config": plan.spec.engine.model_dump(mode="json"),
    }
    data = json.dumps(config, indent=2).encode()
    records = [_put(store, prefix, folder, "config.json", "config", "application/json", data)]
    source, names = open_source(plan.inputs.extra_place), published_names(plan.inputs.extra_format)
    for file in plan.inputs.extra_files:
        content = read_companion(source, file.name)
        if file.identity != "sha256:" + digest_bytes(content):
            raise SourceCorruptError(f"{file.name} of the source was changed during the build", "Run the build again.")
        media_type = "application/json" if file.name.endswith(".json") else "application/octet-stream"
        records.append(_put(store, prefix, folder, f"tokenizer/{names[file.name]}", "tokenizer", media_type, content))
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
