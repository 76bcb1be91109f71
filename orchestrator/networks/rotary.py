"""Inverse frequencies of rotary position embedding, in float32.

Formulas: RoFormer (Su et al. 2021) for the plain embedding; linear and dynamic-NTK interpolation as in transformers; the llama3
scaling as published with Llama 3.1; YaRN (Peng et al. 2023); longrope (Ding et al. 2024) as published with Phi-3. Each formula
returns inverse frequencies and a factor on cos and sin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.base.errors import ArchitectureError
from orchestrator.model.config import ModelConfig

Table = npt.NDArray[np.float32]
Scaling = Mapping[str, Any]
Scaled = tuple[npt.NDArray[Any], float]
"""Inverse frequencies, and the factor on cos and sin."""


def check_rotary(scaling: Scaling | None) -> None:
    """Check that the kind of rotary scaling is supported. Raises ArchitectureError otherwise."""
    if scaling is not None and scaling.get("rope_type") not in FORMULAS:
        raise ArchitectureError(
            f"rotary scaling {scaling.get('rope_type')!r} is not supported", f"Supported: none, {', '.join(FORMULAS)}."
        )


def inverse_frequencies(config: ModelConfig, length: int = 0, *, local: bool = False) -> tuple[Table, float]:
    """Return the radians per position of each rotated pair, [rotary_dim / 2], and the factor on cos and sin.

    `length`: positions of the text. `local`: for the layers with a window, which may have another base. Raises ArchitectureError.
    """
    dim = config.rotary_embedding_dim or (0 if local else config.global_head_size) or config.head_size
    base = config.rotary_base_local if local and config.rotary_base_local is not None else config.rotary_base
    scaling = None if local else config.rotary_scaling
    check_rotary(scaling)
    if scaling is None:
        return _plain(base, dim), 1.0
    frequencies, factor = FORMULAS[scaling["rope_type"]](config, dim, length, scaling)
    return frequencies.astype(np.float32), factor


def _plain(base: float, dim: int) -> Table:
    exponents: Table = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain: Table = (1.0 / np.power(np.float32(base), exponents)).astype(np.float32)
    return plain


def _linear(config: ModelConfig, dim: int, _length: int, scaling: Scaling) -> Scaled:
    return _plain(config.rotary_base, dim) / np.float32(scaling["factor"]), 1.0


def _dynamic(config: ModelConfig, dim: int, length: int, scaling: Scaling) -> Scaled:
    """Raise the base with the length, beyond the trained positions; with alpha (Hunyuan), by a constant within them."""
    trained = config.max_position_embeddings
    ratio = max(length, trained) / trained
    factor = float(scaling["factor"])
    growth = float(scaling["alpha"]) if "alpha" in scaling and length <= trained else factor * ratio - (factor - 1)
    return _plain(config.rotary_base * growth ** (dim / (dim - 2)), dim), 1.0


def _llama3(config: ModelConfig, dim: int, _length: int, scaling: Scaling) -> Scaled:
    """Divide the frequencies of long wavelengths by `factor`, keep those of short ones, and interpolate between."""
    plain, factor = _plain(config.rotary_base, dim), np.float32(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / plain
    blend = (context / wavelengths - low) / (high - low) if high > low else 0.0  # equal bounds: nothing lies between (Llama 4)
    interpolated = (1 - blend) * plain / factor + blend * plain
    scaled = np.where(wavelengths > context / low, plain / factor, interpolated)
    return np.where(wavelengths < context / high, plain, scaled), 1.0


def _yarn(config: ModelConfig, dim: int, _length: int, scaling: Scaling) -> Scaled:
    """Keep high frequencies and divide low ones by `factor`, with a ramp between `beta_fast` and `beta_slow` turns."""
    base, factor = config.rotary_base, float(scaling["factor"])
    trained = int(scaling["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / max(last - first, 0.001), 0, 1)
    plain = _plain(base, dim)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_factor(factor, scaling)


def _yarn_factor(factor: float, scaling: Scaling) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(float(scaling["mscale"])) / scale(float(scaling["mscale_all_dim"]))
    return scale(1.0)


def _longrope(config: ModelConfig, dim: int, length: int, scaling: Scaling) -> Scaled:
    """Divide the frequencies by `short_factor`, or by `long_factor` for texts beyond the trained length.

    The factor on cos and sin is `short_mscale` or `long_mscale` where the scaling has these (Phi-3.5-MoE).
    """
    trained = config.trained_length
    regime = "long" if length > trained else "short"
    factors = np.asarray(scaling[f"{regime}_factor"], np.float32)
    if f"{regime}_mscale" in scaling:
        return _plain(config.rotary_base, dim) / factors, float(scaling[f"{regime}_mscale"])
    stretch = float(scaling.get("factor") or config.max_position_embeddings / trained)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(trained))
    return _plain(config.rotary_base, dim) / factors, float(attention)


def _proportional(config: ModelConfig, dim: int, _length: int, scaling: Scaling) -> Scaled:
    """Rotate the leading part of the pairs only, with the frequencies of a whole head (Gemma 4)."""
    rotated = int(float(scaling["partial_rotary_factor"]) * dim // 2)
    plain = _plain(config.rotary_base, dim) / np.float32(scaling.get("factor") or 1.0)
    return np.where(np.arange(dim // 2) < rotated, plain, np.float32(0)), 1.0


FORMULAS: dict[str, Callable[[ModelConfig, int, int, Scaling], Scaled]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
