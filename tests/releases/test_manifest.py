from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orchestrator.base.digest import CHUNK_BYTES, canonical_json
from orchestrator.base.errors import DigestError, SchemaVersionError
from orchestrator.engines.memory import memory_needed
from orchestrator.engines.record import EngineRecord, TensorRange
from orchestrator.planning.facts import Verification
from orchestrator.releases import manifest as manifest_module
from orchestrator.releases.manifest import (
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    RankRecord,
    Selectors,
    SourceFileRecord,
    manifest_schema,
    parse_manifest,
    seal,
)
from orchestrator.releases.provenance import BuildDefinition, Builder, BuildMetadata, Provenance, RunDetails, identified, public_uri
from tests.support.synthetic import model_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "manifest_tiny.json"


def _file(path: str, role: str, num_bytes: int) -> FileRecord:
    plain = {"path": path, "key": f"0123456789ab/{path}", "role": role, "media_type": "application/octet-stream"}
    return FileRecord.model_validate({**plain, "num_bytes": num_bytes, "sha256": "ab" * 32, "chunks": {"sha256": ["ab" * 32]}})


def _rank(rank: int) -> RankRecord:
    ids = TensorRange(
        name="input_ids",
        dtype="int64",
        mode="input",
        shape=("batch", "tokens"),
        profiles={"prefill": {"min": (1, 1), "opt": (1, 8), "max": (2, 16)}},
    )
    past = TensorRange(
        name="past_key_values.0.key",
        dtype="bfloat16",
        mode="input",
        shape=("batch", 1, 64, 4),
        profiles={"prefill": {"min": (1, 1, 64, 4), "opt": (1, 1, 64, 4), "max": (2, 1, 64, 4)}},
    )
    cache = TensorRange(
        name="present.0.key", dtype="bfloat16", mode="output", shape=("batch", 1, 64, 4), aliases="past_key_values.0.key"
    )
    engine = EngineRecord(
        backend="tensorrt_rtx",
        tensorrt_version="1.7.1.116",
        cuda_version="13",
        compute_capabilities=("8.9", "12.0"),
        profiles=("prefill", "decode"),
        tensors=(ids, past, cache),
        weights_bytes=900,
        context_bytes=500,
    )
    files = (_file(f"rank{rank}.engine", "engine", 1000 + rank),)
    memory = memory_needed(engine, files[0].num_bytes)
    return RankRecord(rank=rank, tp_rank=rank, pp_rank=0, first_layer=0, num_layers=3, engine=engine, memory=memory, files=files)


MANIFEST = Manifest(
    name="tiny",
    version="1",
    build_key="cd" * 32,
    created_at="2026-01-01T00:00:00+00:00",
    source=(SourceFileRecord(path="model.safetensors", num_bytes=5, identity="mtime:1"),),
    model=model_config(rotary_scaling={"rope_type": "llama3", "factor": 8.0}),
    selectors=Selectors(backend="tensorrt_rtx", precision="bfloat16", tp=2, pp=1, gpu="8.9,12.0"),
    tp=2,
    pp=1,
    ranks=(_rank(0), _rank(1)),
    shared=(_file("tokenizer/é.json", "tokenizer", 7),),
    engine_config={"max_batch_size": 2, "workspace_bytes": None},
    verification=Verification(
        num_positions=30, max_absolute_error=1e-6, max_relative_error=2.5e-7, mean_kl=0.0, top1_agreement=1.0
    ),
    tools={"trt-orchestrator": "0.1.0", "tensorrt_rtx": "1.7.1.116"},
    steps={"build/rank0": "ef" * 32},
    provenance=Provenance(
        buildDefinition=BuildDefinition(
            externalParameters={"dtype": "auto"}, resolvedDependencies=(identified("model.safetensors", "sha256:" + "12" * 32),)
        ),
        runDetails=RunDetails(
            builder=Builder(version={"trt-orchestrator": "0.1.0"}),
            metadata=BuildMetadata(invocationId="1", finishedOn="2026-01-01T00:00:00+00:00"),
        ),
    ),
)  # fmt: skip


def plain() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MANIFEST.to_json())
    return found


def parsed(changed: dict[str, Any]) -> Manifest:
    return parse_manifest(seal(changed), "s3://bucket/manifest.json")


def test_to_json_manifest_is_as_the_golden_file_says() -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_bytes(MANIFEST.to_json())
    assert MANIFEST.to_json() == GOLDEN.read_bytes(), "consumers read this: only add fields, then run with UPDATE_GOLDEN=1"


def test_parse_manifest_golden_file_is_read_back() -> None:
    assert parse_manifest(GOLDEN.read_bytes(), "golden") == MANIFEST


def test_to_json_text_is_canonical_and_survives_parsing() -> None:
    data = MANIFEST.to_json()
    assert data == canonical_json(json.loads(data))
    assert parse_manifest(data, "here").to_json() == data


def test_parse_manifest_in_another_layout_than_the_canonical_is_refused() -> None:
    shuffled = json.dumps(dict(reversed(plain().items())), indent=3).encode()
    with pytest.raises(DigestError, match="changed after it was written"):
        parse_manifest(shuffled, "here")


def test_parse_manifest_every_flipped_bit_is_found() -> None:
    data = MANIFEST.to_json()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises((DigestError, SchemaVersionError)):
            parse_manifest(bytes(changed), "here")


def test_parse_manifest_newer_schema_is_refused_by_number() -> None:
    with pytest.raises(
        SchemaVersionError, match=f"schema {SCHEMA_VERSION + 1}, this program reads up to {SCHEMA_VERSION}"
    ) as caught:
        parsed({**plain(), "schema_version": SCHEMA_VERSION + 1})
    assert caught.value.exit_code == 27
    assert "Upgrade" in caught.value.advice


def test_parse_manifest_newer_schema_is_refused_before_its_fields_are_read() -> None:
    with pytest.raises(SchemaVersionError):
        parsed({"schema_version": SCHEMA_VERSION + 1, "layout": "unknown"})


def test_parse_manifest_fields_added_within_the_version_are_kept() -> None:
    changed = plain()
    changed["signature"] = "new"
    changed["ranks"][0]["numa"] = 1
    changed["ranks"][0]["engine"]["driver"] = "600"
    changed["shared"][0]["compression"] = "none"
    changed["provenance"]["runDetails"]["byproducts"] = []
    assert parsed(changed).to_json() == seal(changed)


def test_parse_manifest_chunks_that_do_not_cover_their_file_are_refused() -> None:
    changed = plain()
    changed["ranks"][0]["files"][0]["num_bytes"] = CHUNK_BYTES + 1
    with pytest.raises(DigestError, match="and 1 chunks"):
        parsed(changed)


def test_memory_needed_counts_plan_cache_other_inputs_and_context() -> None:
    need = MANIFEST.ranks[0].memory
    assert need.kv_cache_bytes == 2 * 1 * 64 * 4 * 2
    assert need.io_bytes == 2 * 16 * 8
    assert need.total_bytes == 1000 + need.kv_cache_bytes + need.io_bytes + 500


def test_schema_published_file_is_that_of_the_code() -> None:
    path = Path(manifest_module.__file__).with_name("manifest.schema.json")
    text = json.dumps(manifest_schema(), indent=1) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, "run: orchestrator schema manifest > orchestrator/releases/manifest.schema.json"


def test_schema_accepts_the_golden_manifest_and_refuses_a_spoilt_one() -> None:
    schema = manifest_schema()
    jsonschema.validate(json.loads(GOLDEN.read_bytes()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**plain(), "ranks": "all"}, schema)


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("s3://key:secret@bucket/models/a?token=secret#secret", "s3://bucket/models/a"),
        ("https://secret@host/a", "https://host/a"),
        ("/home/someone/models/a/", "file:a"),
        ("file:///srv/a", "file:a"),
    ],
)
def test_public_uri_of_a_place_has_no_secrets(place: str, shown: str) -> None:
    assert public_uri(place) == shown


def test_parse_manifest_model_field_added_within_the_version_is_passed_over() -> None:
    changed = plain()
    changed["model"]["num_experts"] = 8
    assert parsed(changed) == MANIFEST


@pytest.mark.parametrize(
    "data",
    [b"", b"not json", b"[]", b"null", b"{}", b"\xff\xfe", b'{"schema_version": "1"}', b'{"schema_version": 1}', b"version https://git-lfs"],
)  # fmt: skip
def test_parse_manifest_anything_else_is_refused_with_its_place(data: bytes) -> None:
    with pytest.raises(DigestError, match=r"^s3://bucket/x is not a release manifest"):
        parse_manifest(data, "s3://bucket/x")


@pytest.mark.parametrize("name", ["ranks", "build_key", "model", "shared", "steps"])
def test_parse_manifest_missing_field_is_refused(name: str) -> None:
    changed = plain()
    del changed[name]
    with pytest.raises(DigestError, match=name):
        parsed(changed)


def test_all_files_are_the_ranks_then_the_shared_ones() -> None:
    assert [file.path for file in MANIFEST.all_files()] == ["rank0.engine", "rank1.engine", "tokenizer/é.json"]
    assert MANIFEST.num_bytes == 1000 + 1001 + 7
