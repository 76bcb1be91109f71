"""The manifest of a release: the only contract with programs that load engines.

Schema version 1, published as manifest.schema.json beside this file. Within a major version fields are only added. A reader keeps
unknown fields and refuses a newer major version. The field `digest` is the digest of the rest and detects accidents; the signature
(orchestrator/releases/signing.py) covers these bytes and detects intent.

A manifest is untrusted input. Decoding is strict about types and bounded in size. It refuses paths that leave the folder that a
release is pulled to, ranks that do not add up, and the address of another release.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Set
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import FailFast, Field, ValidationError, model_validator

from orchestrator.base.digest import CHUNK_BYTES, canonical_json, digest_of
from orchestrator.base.errors import DigestError, ReleaseAddressError, SchemaVersionError, SpecError
from orchestrator.base.paths import check_disjoint, check_path
from orchestrator.base.records import LARGEST, Count, Record, Sha256, Word
from orchestrator.engines.record import EngineRecord, MemoryNeed
from orchestrator.model.config import ModelConfig
from orchestrator.planning.facts import Miniature, Verification
from orchestrator.releases.provenance import Provenance
from orchestrator.spec.build import RELEASE_NAME, RELEASE_VERSION

SCHEMA_VERSION = 1
MEDIA_TYPE = "application/vnd.trt-orchestrator.release.v1+json"
RELEASES = "releases"
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
"""Name of a release's signature in a pulled folder."""
_SEAL = "digest"
LIMIT_BYTES = 32 * 2**20
"""Size of the largest manifest that is read. A manifest of 1,000 ranks is about a fifth of it."""
_LIMIT_VALUES = 1_000_000
"""Largest number of JSON values: a few bytes of text may take a hundred of memory."""
_LIMIT_FILES = 10_000
_LISTED_PROBLEMS = 1000
"""Problems that are listed; more are only counted, because each takes a kilobyte."""
_SHOWN_PROBLEMS, _SHOWN_CHARACTERS = 3, 200


Role = Literal["engine", "tokenizer", "config", "report", "weights", "graph", "reference"]
Part = Literal["engines", "portable", "checkpoint"]
"""Part of a release: ReleaseSpec.include of spec/build.py."""
PARTS: tuple[Part, ...] = ("engines", "portable", "checkpoint")


class Chunks(Record):
    """Chunks of a file with their digests, so that each can be fetched and verified separately."""

    num_bytes: int = Field(default=CHUNK_BYTES, ge=1, le=LARGEST)
    """Bytes of every chunk but the last."""
    sha256: Annotated[tuple[Sha256, ...], FailFast()]


class FileRecord(Record):
    """One published object."""

    path: str
    """Target path, relative to the consumer's folder."""
    key: str
    """Key of the object, relative to the manifest."""
    role: Role
    media_type: Word
    num_bytes: Count
    sha256: Sha256
    chunks: Chunks

    @model_validator(mode="after")
    def _stays_below_its_folder(self) -> Self:
        check_path(self.path)
        check_path(self.key)
        if self.path.casefold() in (MANIFEST, SIGNATURE):
            raise ValueError(f"{self.path} is the name of the manifest or of its signature")
        return self

    @model_validator(mode="after")
    def _chunks_cover_it(self) -> Self:
        if len(self.chunks.sha256) != -(-self.num_bytes // self.chunks.num_bytes):
            raise ValueError(f"{self.path} has {self.num_bytes} bytes and {len(self.chunks.sha256)} chunks")
        return self


class RankRecord(Record):
    """One rank: its coordinates and its files."""

    rank: Count
    tp_rank: Count
    pp_rank: Count
    cp_rank: Count = 0
    ep_rank: Count = 0
    """Expert-parallel group of the rank."""
    first_layer: Count
    num_layers: Count
    engine: EngineRecord
    memory: MemoryNeed
    files: Annotated[tuple[FileRecord, ...], FailFast()]
    weights: Annotated[tuple[FileRecord, ...], FailFast()] = ()
    """Weights of the rank, safetensors, for the portable part and the checkpoint. Empty: the release has neither."""


class SourceFileRecord(Record):
    """A file of the source, as identified by the plan."""

    path: str
    num_bytes: Count
    identity: str


class ArtifactRecord(Record):
    """An artifact that the build made and used, by its digest. It is not published with the release."""

    name: str
    num_bytes: Count | None = None
    sha256: str


class QuantizationRecord(Record):
    """Number formats of the weights, and the resulting errors."""

    spec: dict[str, Any]
    """Quantization section of the spec; paths and URLs reduced to names."""
    model: dict[str, Any]
    """Formats by linear: ModelQuantization of model/quantization.py, from which the network was built."""
    calibration: tuple[ArtifactRecord, ...]
    """Applied scales; empty for algorithms without calibration."""
    worst_errors: dict[str, float]
    """|stored - weight| / |weight| of the worst linears, largest first; empty when the weights came from conversions whose outcomes
    are gone.
    """


class Selectors(Record):
    """Properties by which a consumer chooses among the releases of a model."""

    backend: Word
    precision: Word
    """Quantization algorithm, or the model's dtype."""
    tp: Count
    pp: Count
    gpu: Word
    """Name of the GPU, or the compute capabilities, or any."""


class Manifest(Record):
    """A published release."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1)
    media_type: Word = MEDIA_TYPE
    name: str = Field(pattern=RELEASE_NAME)
    version: str = Field(pattern=RELEASE_VERSION)
    build_key: Word
    """Digest of the inputs. The engines' own digests are in their file records."""
    created_at: Word
    source: Annotated[tuple[SourceFileRecord, ...], FailFast()]
    model: ModelConfig
    part_of: str = Field(default="", exclude_if=lambda value: not value)
    """Architecture of the larger model (vision, speech) whose language model this is; empty: the source is of nothing more."""
    selectors: Selectors
    tp: int = Field(ge=1, le=LARGEST)
    pp: int = Field(ge=1, le=LARGEST)
    cp: int = Field(default=1, ge=1, le=LARGEST)
    moe_ep: int = Field(default=1, ge=1, le=LARGEST)
    """Expert-parallel groups among the tensor-parallel ranks."""
    ranks: Annotated[tuple[RankRecord, ...], FailFast()]
    shared: Annotated[tuple[FileRecord, ...], FailFast()]
    """Files that every rank needs: tokenizer and config."""
    documents: Annotated[tuple[FileRecord, ...], FailFast()] = ()
    """Documents for people: the report of the build."""
    reference: FileRecord | None = None
    """Largest logits of the source model on the verification text, for `orchestrator run --check`. None: not verified."""
    portable: Annotated[tuple[FileRecord, ...], FailFast()] = ()
    """Graph of each stage and the config for ONNX Runtime GenAI, which run the ranks' weights. Empty: not in the release."""
    checkpoint: Annotated[tuple[FileRecord, ...], FailFast()] = ()
    """Config and indexes that make a TensorRT-LLM checkpoint of the ranks' weights. Empty: not in the release."""
    engine_config: dict[str, Any]
    """TensorRT options of the build: BuildConfig of spec/build.py."""
    quantization: QuantizationRecord | None = None
    verification: Verification | None = None
    """Results of the verification. None: the spec switched it off."""
    miniature: Miniature | None = None
    """Results of the miniature. None: published before miniatures existed."""
    tools: dict[str, str]
    steps: dict[str, str]
    """Digests of the steps that made this release, by step name."""
    provenance: Provenance

    @model_validator(mode="after")
    def _ranks_are_all_there(self) -> Self:
        count = self.tp * self.pp * self.cp
        if sorted(record.rank for record in self.ranks) != list(range(min(count, len(self.ranks) + 1))):
            raise ValueError(f"tp={self.tp} pp={self.pp} cp={self.cp} has {count} ranks, 0 and up; {len(self.ranks)} are listed")
        places = {(record.tp_rank, record.pp_rank, record.cp_rank) for record in self.ranks}
        if len(places) != count or any(tp >= self.tp or pp >= self.pp or cp >= self.cp for tp, pp, cp in places):
            raise ValueError("two of its ranks have the same place in tp, pp and cp")
        return self

    @model_validator(mode="after")
    def _files_do_not_collide(self) -> Self:
        files = self.all_files()
        if len(files) > _LIMIT_FILES:
            raise ValueError(f"{len(files):,} files are more than a release can have")
        found: dict[str, FileRecord] = {}
        for file in files:
            if found.setdefault(file.path, file) != file:
                raise ValueError(f"{file.path} is listed twice, as different files")
        check_disjoint(found)
        return self

    def to_json(self) -> bytes:
        """Return the canonical JSON: the bytes that are stored and signed."""
        return seal(self.model_dump(mode="json"))

    def all_files(self) -> list[FileRecord]:
        return self.files_of({rank.rank for rank in self.ranks}, PARTS)

    def files_of(self, ranks: Set[int], parts: Collection[Part]) -> list[FileRecord]:
        """Return the files of some parts that some ranks need: those of the ranks, the parts' own, shared files, documents.

        The portable part runs all ranks in one process, so it needs the weights of all.
        """
        wanted = [rank for rank in self.ranks if rank.rank in ranks]
        weights = self.ranks if "portable" in parts else wanted if "checkpoint" in parts else ()
        return [
            *(file for rank in wanted if "engines" in parts for file in rank.files),
            *(file for rank in weights for file in rank.weights),
            *(self.portable if "portable" in parts else ()),
            *(self.checkpoint if "checkpoint" in parts else ()),
            *self.shared,
            *([self.reference] if self.reference else []),
            *self.documents,
        ]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that the release has."""
        has = {"engines": True, "portable": bool(self.portable), "checkpoint": bool(self.checkpoint)}
        return tuple(part for part in PARTS if has[part])

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.all_files())

    def rank(self, number: int) -> RankRecord:
        """Return the record of a rank. Raises KeyError."""
        for record in self.ranks:
            if record.rank == number:
                return record
        raise KeyError(number)


def parse_parts(names: Collection[str] | None) -> tuple[Part, ...] | None:
    """Return the parts of these names; None for all that a layout holds. Raises SpecError for other names."""
    if not names:
        return None
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise SpecError(f"a release has no part {unknown[0]!r}", f"Parts: {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in names)


def seal(plain: dict[str, Any]) -> bytes:
    """Return the canonical JSON of a manifest's fields, including the digest of them all."""
    rest = {name: value for name, value in plain.items() if name != _SEAL}
    return canonical_json({**rest, _SEAL: digest_of(rest)})


def parse_manifest(data: bytes, address: str) -> Manifest:
    """Decode the manifest that was read at `address`, the URL or the key of the object.

    Raises SchemaVersionError for a newer manifest, ReleaseAddressError when `address` names another release, DigestError for a
    damaged manifest or other content.
    """
    try:
        found = Manifest.model_validate_json(canonical_json(_unsealed(data, address)), strict=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DigestError(f"{address} is not a release manifest: {_reason(error)}") from None
    check_address(found, address)
    return found


def _unsealed(data: bytes, address: str) -> dict[str, Any]:
    """Return the fields of a manifest. Raises SchemaVersionError, and ValueError and the like for other content."""
    if len(data) > LIMIT_BYTES:
        raise ValueError(f"{len(data):,} bytes are more than a manifest can have")
    num_values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if num_values > _LIMIT_VALUES:
        raise ValueError(f"about {num_values:,} values are more than a manifest can have")
    plain: dict[str, Any] = json.loads(data)
    version = plain["schema_version"]
    if type(version) is not int or version < 1:
        raise ValueError("schema_version is not a positive integer")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(f"{address} has manifest schema {version}, this program reads up to {SCHEMA_VERSION}")
    del plain[_SEAL]
    if seal(plain) != data:
        raise ValueError("its content does not match its own digest: it was changed after it was written")
    return plain


def _reason(error: Exception) -> str:
    """Return the reason why a manifest does not decode, in a few words whatever its content."""
    if isinstance(error, ValidationError):
        if error.error_count() > _LISTED_PROBLEMS:
            return f"{error.error_count():,} of its values are wrong"
        found = error.errors(include_url=False, include_input=False, include_context=False)
        shown = [f"{'.'.join(map(str, entry['loc'])) or '(top)'}: {entry['msg']}" for entry in found[:_SHOWN_PROBLEMS]]
        more = [f"and {len(found) - len(shown)} more"] if len(found) > len(shown) else []
        return "; ".join([_cut(text.replace("Value error, ", "")) for text in shown] + more)
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return _cut(" ".join(str(error).split()))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def check_address(manifest: Manifest, address: str) -> None:
    """Check that `address` names this release or no release at all. Raises ReleaseAddressError.

    A signature covers bytes, not their location: an older release copied over a newer one is still signed.
    """
    expected = address_parts(address)
    if expected is not None and expected != (manifest.name, manifest.version):
        raise ReleaseAddressError(
            f"{address} is the address of {expected[0]} {expected[1]}, but holds the manifest of {manifest.name} {manifest.version}"
        )


def address_parts(address: str) -> tuple[str, str] | None:
    """Return name and version of an address .../releases/<name>/<version>; None for others, such as a pulled folder's."""
    scheme, marked, rest = address.rpartition("://")
    parts: list[str] = []
    for part in (unquote(rest) if scheme == "file" else rest if marked else address).split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    parts = parts[:-1] if parts[-1:] == [MANIFEST] else parts
    return (parts[-2], parts[-1]) if parts[-3:-2] == [RELEASES] else None


def manifest_schema() -> dict[str, Any]:
    """Return the JSON Schema of a manifest as stored."""
    found = Manifest.model_json_schema(mode="serialization")
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["properties"][_SEAL] = {
        "type": "string",
        "pattern": "^[0-9a-f]{64}$",
        "description": "sha256 of the canonical JSON of the other fields.",
    }
    found["required"] = sorted([*found["required"], _SEAL])
    return found


def release_prefix(name: str, version: str) -> str:
    """Return the key prefix of a release in its store, with a trailing '/'."""
    return f"{RELEASES}/{name}/{version}/"


def signature_key(manifest_digest: str) -> str:
    """Return the key of a manifest's signature, relative to the manifest. It holds the digest, so no other manifest can use it."""
    return f"signatures/{manifest_digest}.sig"
