"""The manifest of a release: the only contract with those who load engines.

Schema version 1. Within a major version fields are only added; a reader refuses a newer major version.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.core.digest import canonical_json
from orchestrator.core.errors import DigestError, SchemaVersionError
from orchestrator.core.model_config import ModelConfig

SCHEMA_VERSION = 1
MEDIA_TYPE = "application/vnd.trt-orchestrator.release.v1+json"


Role = Literal["engine", "tokenizer", "config"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileRecord(_Record):
    """One published object."""

    path: str
    """Where a consumer puts it, relative to a folder of his."""
    key: str
    """Where it lies, relative to the manifest."""
    role: Role
    media_type: str
    num_bytes: int
    sha256: str


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
    compute_capabilities: tuple[str, ...]
    """Those that the engine was built for; empty: the default set of the library."""
    profiles: tuple[str, ...]
    """Names of the optimization profiles, by index."""
    tensors: tuple[TensorRange, ...]


class RankRecord(_Record):
    """One rank: where it stands, what it loads."""

    rank: int
    tp_rank: int
    pp_rank: int
    first_layer: int
    num_layers: int
    engine: EngineRecord
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
    mean_kl: float
    top1_agreement: float
    perplexity_ratio: float | None = None
    """Of the text that was read: the graphs' perplexity over the reference's."""


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
    tp: int
    pp: int
    ranks: tuple[RankRecord, ...]
    shared: tuple[FileRecord, ...]
    """What every rank needs: tokenizer and config."""
    engine_config: dict[str, Any]
    quantization: dict[str, Any] | None = None
    verification: Verification | None = None
    """None: the spec had switched verification off."""
    tools: dict[str, str]
    steps: dict[str, str]
    """Step name to digest: where this release came from."""

    def to_json(self) -> bytes:
        """Canonical JSON: the bytes that are stored and signed."""
        return canonical_json(self.model_dump(mode="json"))

    def all_files(self) -> list[FileRecord]:
        return [file for rank in self.ranks for file in rank.files] + list(self.shared)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.all_files())


def parse_manifest(data: bytes, origin: str) -> Manifest:
    """Decode a manifest. Raises SchemaVersionError for a newer one, DigestError when it is none."""
    try:
        plain = json.loads(data)
        version = plain["schema_version"]
        if not isinstance(version, int):
            raise ValueError("schema_version is not a number")
        if version > SCHEMA_VERSION:
            raise SchemaVersionError(f"{origin} has manifest schema {version}, this program reads up to {SCHEMA_VERSION}")
        return Manifest.model_validate(plain)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DigestError(f"{origin} is not a release manifest: {error}") from None
