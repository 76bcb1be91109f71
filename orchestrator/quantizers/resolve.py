"""Resolution of the spec's quantization: the format of every linear, its calibration method, and the tolerance."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.base.errors import QuantizationError
from orchestrator.model.quantization import (
    ALWAYS_EXCLUDED,
    MIXED_PRECISION,
    ActivationFormat,
    CalibrationMethod,
    LinearFormat,
    ModelQuantization,
    WeightFormat,
)
from orchestrator.quantizers import QUANTIZERS, Quantizer
from orchestrator.spec.build import QuantizationSpec, ToleranceSpec

KV_CACHE_TOLERANCES = {
    "INT8": ToleranceSpec(max_relative_error=None, max_mean_kl=0.01, min_top1_agreement=0.95),
    "FP8": ToleranceSpec(max_relative_error=None, max_mean_kl=0.02, min_top1_agreement=0.92),
}
_META_LIMIT = 1200.0
"""Bound of activations in Meta's FP8 recipe (TensorRT-LLM's clamp_val)."""


def quantizer_named(name: str) -> Quantizer:
    """Return the quantizer of this name. Raises QuantizationError, which lists the known names."""
    if name not in QUANTIZERS:
        near = difflib.get_close_matches(name.upper(), QUANTIZERS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise QuantizationError(f"no quantizer is named {name!r}", f"{hint}Quantizers: {', '.join(QUANTIZERS)}.")
    return QUANTIZERS[name]


def model_quantization(spec: QuantizationSpec, num_layers: int) -> ModelQuantization:
    """Return the formats of a model's linears. Raises QuantizationError for options that the algorithm does not have."""
    if spec.algorithm is None:
        return ModelQuantization(algorithm=None, kv_cache=spec.kv_cache)
    if spec.algorithm == MIXED_PRECISION:
        assert spec.quant_cfg is not None  # checked by the spec
        return ModelQuantization(algorithm=MIXED_PRECISION, layers=_read_layers(Path(spec.quant_cfg)), kv_cache=spec.kv_cache)
    quantizer = quantizer_named(spec.algorithm)
    _check_options(spec, quantizer)
    linear = quantizer.linear
    if spec.group_size is not None:
        linear = linear.model_copy(update={"block_size": spec.group_size})
    exclude = spec.exclude if spec.exclude is not None else quantizer.exclude
    if spec.meta_recipe:
        linear = linear.model_copy(update={"activation_limit": _META_LIMIT})
        exclude = (*exclude, "*.attention.*", *(f"transformer.layers.{layer}.*" for layer in (0, num_layers - 1)))
    alpha = calibration_method(spec, linear.algorithm).alpha if quantizer.calibration else None
    return ModelQuantization(
        algorithm=linear.algorithm,
        linear=linear,
        exclude=exclude,
        kv_cache=spec.kv_cache,
        alpha=alpha,
        meta_recipe=spec.meta_recipe,
    )


def calibration_method(spec: QuantizationSpec, algorithm: str) -> CalibrationMethod:
    """Return the calibration method of an algorithm under this spec. Raises QuantizationError for a data-free algorithm."""
    method = quantizer_named(algorithm).calibration
    if method is None:
        raise QuantizationError(f"{algorithm} needs no calibration", "Leave quantization.calibration out.")
    if spec.alpha is not None and method.alpha is not None:
        return method.model_copy(update={"alpha": spec.alpha})
    return method


def _check_options(spec: QuantizationSpec, quantizer: Quantizer) -> None:
    name, fmt = quantizer.linear.algorithm, quantizer.linear
    blockwise = "W4A16, W4A16_AWQ and W4A8_AWQ"
    if spec.group_size is not None and not fmt.weight.value.startswith("int4"):
        raise QuantizationError(f"{name} has no choice of group_size", f"Leave it out; it is for {blockwise}.")
    if spec.alpha is not None and (quantizer.calibration is None or quantizer.calibration.alpha is None):
        raise QuantizationError(f"{name} has no alpha", "Leave it out; it is for W8A8_SQ_PER_CHANNEL.")
    if spec.meta_recipe and name != "FP8_PER_CHANNEL_PER_TOKEN":
        raise QuantizationError(f"{name} has no meta_recipe", "Leave it out; it is for FP8_PER_CHANNEL_PER_TOKEN.")


def _read_layers(path: Path) -> dict[str, LinearFormat | None]:
    """Read TensorRT-LLM's quant_cfg.json: {"quantized_layers": {linear: {"quant_algo": ..., "group_size": ...}}}."""
    try:
        listed: Mapping[str, Any] = json.loads(path.read_bytes())["quantized_layers"]
        return {name: _layer_format(entry) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantizationError(
            f"{path} is not a quant_cfg.json: {error}", "It needs quantized_layers: linear -> {quant_algo, group_size}."
        ) from None


def _layer_format(entry: Mapping[str, Any]) -> LinearFormat:
    fmt = quantizer_named(entry["quant_algo"]).linear
    if "weight_format" in entry:
        fmt = fmt.model_copy(update={"weight": WeightFormat(entry["weight_format"])})
    size = entry.get("group_size")
    return fmt.model_copy(update={"block_size": int(size)}) if size and fmt.weight.value.startswith("int4") else fmt


def from_checkpoint(block: Mapping[str, Any], mixture: Mapping[str, Any] | None) -> ModelQuantization | None:
    """Return the formats of a TensorRT-LLM checkpoint, ours or Model Optimizer's, from its `quantization` block and quant_cfg.json.

    Raises QuantizationError for an unknown algorithm or KV cache format.
    """
    algorithm, kv_cache = block.get("quant_algo"), block.get("kv_cache_quant_algo")
    if kv_cache not in (None, "INT8", "FP8"):
        raise QuantizationError(f"a KV cache in {kv_cache} is not supported", "Supported: INT8, FP8.")
    if algorithm is None:
        return ModelQuantization(algorithm=None, kv_cache=kv_cache) if kv_cache else None
    if algorithm == MIXED_PRECISION:
        listed = (mixture or {}).get("quantized_layers", {})
        layers = {name: _layer_format(entry) for name, entry in listed.items()}
        return ModelQuantization(algorithm=algorithm, layers=layers, kv_cache=kv_cache)
    linear = _layer_format({"quant_algo": algorithm, "group_size": block.get("group_size")})
    limit = (block.get("clamp_val") or [None, None])[1] if block.get("use_meta_recipe") else None
    return ModelQuantization(
        algorithm=algorithm,
        linear=linear.model_copy(update={"activation_limit": limit}),
        exclude=tuple(name for name in block.get("exclude_modules") or () if name not in ALWAYS_EXCLUDED),
        kv_cache=kv_cache,
        alpha=block.get("smoothquant_val") if quantizer_named(algorithm).linear.pre_quant_scale and not linear.block_size else None,
        meta_recipe=bool(block.get("use_meta_recipe")),
    )


def tolerance(quantization: ModelQuantization | None) -> ToleranceSpec:
    """Return the tolerance of verification against the reference in the build's dtype: the sum for linears and KV cache."""
    if quantization is None:
        return ToleranceSpec()
    if quantization.as_stored:
        return _stored_tolerance(quantization)
    parts = [quantizer_named(name).tolerance for name in sorted({fmt.algorithm for fmt in quantization.formats()})]
    # In a mixture each linear has only one format, so the worst format bounds the error.
    worst = [max(parts, key=lambda part: part.max_mean_kl)] if parts else []
    if quantization.kv_cache:
        worst.append(KV_CACHE_TOLERANCES[quantization.kv_cache])
    return ToleranceSpec(
        max_relative_error=None,
        max_mean_kl=sum(part.max_mean_kl for part in worst),
        min_top1_agreement=max(0.0, 1.0 - sum(1.0 - part.min_top1_agreement for part in worst)),
    )


_STORED_TOLERANCE = ToleranceSpec(max_relative_error=None, max_mean_kl=0.01, min_top1_agreement=0.95)
"""Tolerance of weights that keep the source's format. The reference has the same values, rounded to the build's dtype."""


def _stored_tolerance(quantization: ModelQuantization) -> ToleranceSpec:
    """Return the tolerance of a model with the source's weights: only activations, and the KV cache, are rounded further."""
    rounded = any(fmt.activation is not ActivationFormat.NONE for fmt in quantization.formats())
    if rounded or quantization.kv_cache:
        return tolerance(quantization.model_copy(update={"as_stored": False}))
    return _STORED_TOLERANCE
