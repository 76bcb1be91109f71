"""What a source checkpoint holds, known from its headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of weights."""

    name: str
    """Relative to the checkpoint's folder."""
    num_bytes: int
    identity: str
    """Changes whenever the content may have changed; says nothing of the place. Readers define it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: where its bytes lie and what they mean."""

    name: str
    dtype: str
    """safetensors' name, e.g. BF16."""
    shape: tuple[int, ...]
    file: int
    """Index into CheckpointIndex.files."""
    offset: int
    """First byte, from the start of the file."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """Every tensor of a checkpoint, and its config."""

    format: str
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    """The source's own config.json, undecoded."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, headers excluded."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())
