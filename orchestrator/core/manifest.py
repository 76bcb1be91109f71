"""The manifest of a release: the only contract with those who load engines.

Schema version 1, published as manifest.schema.json beside this file. Within a major version fields are only added, and a
reader keeps those that it does not know; it refuses a newer major version. The field `digest` is the digest of the rest: it
finds accidents. What finds intent is the signature (orchestrator/signing.py), which covers these bytes.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.core.digest import CHUNK_BYTES, canonical_json, digest_of
from orchestrator.core.errors import DigestError, SchemaVersionError
from orchestrator.core.model_config import ModelConfig
from orchestrator.core.provenance import Provenance

SCHEMA_VERSION = 1
MEDIA_TYPE = "application/vnd.trt-orchestrator.release.v1+json"
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
"""Name of a release's signature in a pulled folder."""
_SEAL = "digest"

Role = Literal["engine", "tokenizer", "config", "report"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Chunks(_Record):
    """The pieces of a file, each with its digest, so that each is fetched and verified alone."""

    num_bytes: int = Field(default=CHUNK_BYTES, ge=1)
    """Of every chunk but the last."""
    sha256: tuple[str, ...]


class FileRecord(_Record):
    """One published object."""

    path: str
    """Where a consumer puts it, relative to a folder of his."""
    key: str
    """Where it lies, relative to the manifest."""
    role: Role
    media_type: str
    num_bytes: int = Field(ge=0)
    sha256: str
    chunks: Chunks

    @model_validator(mode="after")
    def _chunks_cover_it(self) -> Self:
        if len(self.chunks.sha256) != -(-self.num_bytes // self.chunks.num_bytes):
            raise ValueError(f"{self.path} has {self.num_bytes} bytes and {len(self.chunks.sha256)} chunks")
        return self


class TensorRange(_Record):
    """An input or output of an engine, with the shapes of each optimization profile."""

    name: str
    dtype: str
    mode: Literal["input", "output"]
    shape: tuple[int | str, ...]
    """A dynamic dimension is its name."""
    profiles: dict[str, dict[str, tuple[int, ...]]] = Field(default_factory=dict)
    """Inputs only: profile -> min, opt, max."""
    aliases: str | None = None
    """Outputs only: the input whose memory must be bound here too (KV cache). A quantized cache (INT8, FP8) has none: it needs
    two buffers, to be swapped after each call."""


class EngineRecord(_Record):
    """What a runtime must know of an engine before it loads it."""

    backend: Literal["tensorrt", "tensorrt_rtx"]
    tensorrt_version: str
    cuda_version: str | None = None
    """Of the CUDA that the library was made for: its major version, e.g. 13."""
    gpu_name: str | None = None
    """tensorrt: the GPU that it was built on, as NVML names it. tensorrt_rtx builds without one."""
    compute_capabilities: tuple[str, ...]
    """tensorrt: that of the GPU. tensorrt_rtx: the targets; empty: every one that the library supports."""
    profiles: tuple[str, ...]
    """Names of the optimization profiles, by index."""
    tensors: tuple[TensorRange, ...]
    weights_bytes: int | None = None
    context_bytes: int | None = None
    """Device memory of an execution context with the most demanding profile; None: TensorRT did not tell."""


class MemoryNeed(_Record):
    """What a rank takes of its GPU's memory, besides CUDA itself."""

    engine_bytes: int
    kv_cache_bytes: int
    """At the largest batch and sequence."""
    io_bytes: int
    """Other inputs and outputs, at the largest shapes."""
    context_bytes: int | None
    total_bytes: int


class RankRecord(_Record):
    """One rank: where it stands, what it loads."""

    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int = 0
    ep_rank: int = 0
    """Expert-parallel group that it belongs to."""
    first_layer: int
    num_layers: int
    engine: EngineRecord
    memory: MemoryNeed
    files: tuple[FileRecord, ...]


class SourceFileRecord(_Record):
    """A file of the source, as the plan identified it."""

    path: str
    num_bytes: int
    identity: str


class Verification(_Record):
    """How far float32 execution of the ranks' graphs was from the reference."""

    num_positions: int
    max_absolute_error: float
    max_relative_error: float
    max_relative_error_to_source: float | None = None
    """The same against the source's weights as they are, not rounded to the build's dtype first: what the dtype costs is in it."""
    mean_kl: float
    top1_agreement: float
    perplexity_ratio: float | None = None
    """Of the text that was read: the graphs' perplexity over the reference's."""

    def relative_errors(self) -> str:
        """Both relative errors in words; the second only where rounding to the build's dtype makes it another number."""
        words, to_source = f"{self.max_relative_error:.2e}", self.max_relative_error_to_source
        if to_source is None or to_source == self.max_relative_error:
            return words
        return f"{words} ({to_source:.2e} against the source before rounding)"


class ArtifactRecord(_Record):
    """Something that the build made and used, by its digest; not published with the release."""

    name: str
    num_bytes: int | None = None
    sha256: str


class QuantizationRecord(_Record):
    """In which formats the weights are stored, and what that did to them."""

    spec: dict[str, Any]
    """As it was asked for; paths by their names alone."""
    model: dict[str, Any]
    """Formats by linear: ModelQuantization of core/quantization.py, as the network was built with it."""
    calibration: tuple[ArtifactRecord, ...]
    """The scales that were applied; empty for algorithms without calibration."""
    worst_errors: dict[str, float]
    """|stored - weight| / |weight| of the linears where it is largest, largest first; empty when the weights came from
    conversions whose outcomes are gone."""


class Selectors(_Record):
    """By what a consumer chooses among the releases of a model."""

    backend: str
    precision: str
    """Quantization algorithm, or the model's dtype."""
    tp: int
    pp: int
    gpu: str
    """Name of the GPU, or the compute capabilities, or any."""


class Manifest(_Record):
    """What was published."""

    schema_version: int = SCHEMA_VERSION
    media_type: str = MEDIA_TYPE
    name: str
    version: str
    build_key: str
    """Digest of the inputs; the engines' own digests stand with their files."""
    created_at: str
    source: tuple[SourceFileRecord, ...]
    model: ModelConfig
    selectors: Selectors
    tp: int
    pp: int
    cp: int = 1
    moe_ep: int = 1
    """Expert-parallel groups among the tensor-parallel ranks."""
    ranks: tuple[RankRecord, ...]
    shared: tuple[FileRecord, ...]
    """What every rank needs: tokenizer and config."""
    documents: tuple[FileRecord, ...] = ()
    """For people: the report of the build."""
    engine_config: dict[str, Any]
    """How TensorRT was asked to compile: BuildConfig of core/spec.py."""
    quantization: QuantizationRecord | None = None
    verification: Verification | None = None
    """None: the spec had switched verification off."""
    tools: dict[str, str]
    steps: dict[str, str]
    """Step name to digest: where this release came from."""
    provenance: Provenance

    def to_json(self) -> bytes:
        """Canonical JSON: the bytes that are stored and signed."""
        return seal(self.model_dump(mode="json"))

    def all_files(self) -> list[FileRecord]:
        return [file for rank in self.ranks for file in rank.files] + [*self.shared, *self.documents]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.all_files())

    def rank(self, number: int) -> RankRecord:
        """Raises KeyError."""
        for record in self.ranks:
            if record.rank == number:
                return record
        raise KeyError(number)


def seal(plain: dict[str, Any]) -> bytes:
    """The canonical JSON of a manifest's fields with the digest of them all among them."""
    rest = {name: value for name, value in plain.items() if name != _SEAL}
    return canonical_json({**rest, _SEAL: digest_of(rest)})


def parse_manifest(data: bytes, origin: str) -> Manifest:
    """Decode a manifest. Raises SchemaVersionError for a newer one, DigestError when it is damaged or none at all."""
    try:
        plain = json.loads(data)
        version = plain["schema_version"]
        if not isinstance(version, int):
            raise ValueError("schema_version is not a number")
        if version > SCHEMA_VERSION:
            raise SchemaVersionError(f"{origin} has manifest schema {version}, this program reads up to {SCHEMA_VERSION}")
        del plain[_SEAL]
        if seal(plain) != data:
            raise ValueError("it is not what its own digest says: it was changed after it was written")
        return Manifest.model_validate(plain)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise DigestError(f"{origin} is not a release manifest: {error}") from None


def manifest_schema() -> dict[str, Any]:
    """JSON Schema of a manifest as it is stored."""
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
    """Key prefix of a release in its store; ends with '/'."""
    return f"releases/{name}/{version}/"


def signature_key(manifest_digest: str) -> str:
    """Where the signature of a manifest stands, relative to it: by digest, so that no other manifest can be given it."""
    return f"signatures/{manifest_digest}.sig"
