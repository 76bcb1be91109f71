"""Rotary position embedding tables, computed by us in float32.

Formulas: RoFormer (Su et al. 2021) for the plain table; the llama3 scaling as published with Llama 3.1 (wavelengths
longer than original_max_position_embeddings / low_freq_factor are slowed by `factor`, those shorter than the high-frequency
bound are kept, between them the two are interpolated).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.core.errors import ArchitectureError
from orchestrator.core.model_config import ModelConfig

Table = npt.NDArray[np.float32]
SUPPORTED = ("linear", "llama3")


def check_rotary(scaling: Mapping[str, Any] | None) -> None:
    """Raises ArchitectureError for a kind of rotary scaling that has no formula here."""
    if scaling is not None and scaling.get("rope_type") not in SUPPORTED:
        raise ArchitectureError(
            f"rotary scaling {scaling.get('rope_type')!r} is not supported", f"Supported: none, {', '.join(SUPPORTED)}."
        )


def rotary_tables(config: ModelConfig, length: int) -> tuple[Table, Table]:
    """cos and sin of shape [length, head_size / 2] for positions 0..length-1."""
    frequencies = inverse_frequencies(config)
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def inverse_frequencies(config: ModelConfig) -> Table:
    """Radians per position for each of the head_size / 2 pairs."""
    exponents: Table = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    plain: Table = (1.0 / np.power(np.float32(config.rotary_base), exponents)).astype(np.float32)
    scaling = config.rotary_scaling
    check_rotary(scaling)
    if scaling is None:
        return plain
    factor = np.float32(scaling["factor"])
    if scaling["rope_type"] == "linear":
        slowed: Table = np.divide(plain, factor, dtype=np.float32)
        return slowed
    return _llama3(plain, factor, scaling)


def _llama3(plain: Table, factor: np.float32, scaling: Mapping[str, Any]) -> Table:
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / plain
    blend = (context / wavelengths - low) / (high - low)
    interpolated = (1 - blend) * plain / factor + blend * plain
    scaled = np.where(wavelengths > context / low, plain / factor, interpolated)
    kept: Table = np.where(wavelengths < context / high, plain, scaled).astype(np.float32)
    return kept
