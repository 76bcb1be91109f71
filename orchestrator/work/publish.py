"""Publish a finished build: objects first, the manifest last and only if there is none.

    releases/<name>/<version>/manifest.json
    releases/<name>/<version>/<build>/...        objects, in a folder named by the build key

Two different builds that publish one version at once write to different folders; whose manifest lands first wins, and
the manifest always names its own objects.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Iterable, Mapping

from orchestrator.checkpoints.places import open_place
from orchestrator.core.digest import digest_bytes
from orchestrator.core.errors import ReleaseExistsError, SourceCorruptError
from orchestrator.core.manifest import (
    EngineRecord,
    FileRecord,
    Manifest,
    RankRecord,
    Role,
    SourceFileRecord,
    Verification,
    parse_manifest,
)
from orchestrator.core.model_config import to_trtllm
from orchestrator.core.options import BuildOptions
from orchestrator.core.plan import Plan
from orchestrator.core.spec import ReleaseSpec
from orchestrator.core.step import Kind, Outcome
from orchestrator.stores import ObjectExistsError, ObjectMissingError, Store

MANIFEST = "manifest.json"
_ENGINE_TYPE = "application/vnd.nvidia.tensorrt.engine"
_BUILD_DIGITS = 12


def release_prefix(release: ReleaseSpec) -> str:
    """Key prefix of a release; ends with '/'."""
    return f"releases/{release.name}/{release.version}/"


def published(store: Store, release: ReleaseSpec) -> Manifest | None:
    """The manifest under this name and version; None when there is none."""
    key = release_prefix(release) + MANIFEST
    try:
        return parse_manifest(store.get(key), f"{store.url}/{key}")
    except ObjectMissingError:
        return None


def check_free(store: Store, release: ReleaseSpec, build_key: str) -> Manifest | None:
    """The release if this very build is published already; None when the version is free.

    Raises ReleaseExistsError when another build has it.
    """
    existing = published(store, release)
    if existing is not None and existing.build_key != build_key:
        raise ReleaseExistsError(
            f"{release.name} {release.version} is already published in {store.url} by another build "
            f"(build key {existing.build_key[:_BUILD_DIGITS]}, this one is {build_key[:_BUILD_DIGITS]})"
        )
    return existing


def publish(store: Store, plan: Plan, outcomes: Mapping[str, Outcome]) -> Manifest:
    """Copy engines and small files into the release, then commit the manifest.

    Returns the manifest that stands: ours, or that of the same build if another process was faster. Raises
    ReleaseExistsError when a different build was faster.
    """
    release, build_key = plan.spec.release, plan.build_key
    prefix = release_prefix(release)
    folder = build_key[:_BUILD_DIGITS] + "/"
    ranks = tuple(_publish_rank(store, prefix, folder, outcomes[step.digest]) for step in plan.of_kind(Kind.BUILD))
    shared = tuple(_publish_shared(store, prefix, folder, plan))
    manifest = Manifest(
        name=release.name,
        version=release.version,
        build_key=build_key,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source=tuple(
            SourceFileRecord(path=file.name, num_bytes=file.num_bytes, identity=file.identity)
            for file in plan.inputs.index.files + plan.inputs.extra_files
        ),
        model=plan.inputs.config,
        tp=plan.topology.tp,
        pp=plan.topology.pp,
        ranks=ranks,
        shared=shared,
        engine_config=plan.spec.engine.model_dump(mode="json"),
        quantization=plan.spec.quantization.model_dump(mode="json") if plan.spec.quantization else None,
        verification=_verification(plan, outcomes),
        tools=_tools(outcomes[step.digest] for step in plan.steps if step.digest in outcomes),
        steps={step.name: step.digest for step in plan.steps},
    )
    try:
        store.put(prefix + MANIFEST, manifest.to_json(), create=True)
    except ObjectExistsError:
        return check_free(store, release, build_key) or manifest
    return manifest


def _publish_rank(store: Store, prefix: str, folder: str, outcome: Outcome) -> RankRecord:
    (output,) = outcome.outputs
    key = folder + output.name
    store.copy(output.key, prefix + key)
    options = BuildOptions.model_validate(outcome.facts["options"])
    file = FileRecord(
        path=output.name, key=key, role="engine", media_type=_ENGINE_TYPE, num_bytes=output.num_bytes, sha256=output.sha256
    )
    return RankRecord(
        rank=options.rank,
        tp_rank=options.tp_rank,
        pp_rank=options.stage.pp_rank,
        first_layer=options.stage.first_layer,
        num_layers=options.stage.num_layers,
        engine=EngineRecord.model_validate(outcome.facts["engine"]),
        files=(file,),
    )


def _publish_shared(store: Store, prefix: str, folder: str, plan: Plan) -> list[FileRecord]:
    """The runtime's config and the source's tokenizer and config files."""
    config = {
        "pretrained_config": to_trtllm(plan.inputs.config, plan.topology, plan.inputs.model_quantization),
        "build_config": plan.spec.engine.model_dump(mode="json"),
    }
    data = json.dumps(config, indent=2).encode()
    records = [_put(store, prefix, folder, "config.json", "config", "application/json", data)]
    source = open_place(plan.inputs.source)
    for file in plan.inputs.extra_files:
        content = source.read(file.name)
        if file.identity != "sha256:" + digest_bytes(content):
            raise SourceCorruptError(f"{file.name} of the source was changed during the build", "Run the build again.")
        media_type = "application/json" if file.name.endswith(".json") else "application/octet-stream"
        records.append(_put(store, prefix, folder, f"tokenizer/{file.name}", "tokenizer", media_type, content))
    return records


def _put(store: Store, prefix: str, folder: str, path: str, role: Role, media_type: str, data: bytes) -> FileRecord:
    store.put(prefix + folder + path, data)
    return FileRecord(
        path=path, key=folder + path, role=role, media_type=media_type, num_bytes=len(data), sha256=digest_bytes(data)
    )


def _verification(plan: Plan, outcomes: Mapping[str, Outcome]) -> Verification | None:
    for step in plan.of_kind(Kind.VERIFY):
        numbers = outcomes[step.digest].facts.get("verification")
        if numbers:
            return Verification.model_validate(numbers)
    return None


def _tools(outcomes: Iterable[Outcome]) -> dict[str, str]:
    tools = {"trt-orchestrator": _own_version()}
    for outcome in outcomes:
        tools.update(outcome.tools)
    return dict(sorted(tools.items()))


def _own_version() -> str:
    try:
        return importlib.metadata.version("trt-orchestrator")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"
