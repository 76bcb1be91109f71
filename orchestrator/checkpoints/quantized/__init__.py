"""Quantized sources: the codes and scales of a weight become one tensor of the index, dequantized while its rows are read.

Detects the tool by `quantization_config` of config.json, or by the file that its early versions wrote. What is not read is
refused, with advice for the tool that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.base.dtypes import MODEL_DTYPES
from orchestrator.checkpoints.quantized.encodings import encoded
from orchestrator.checkpoints.quantized.methods import Described
from orchestrator.checkpoints.quantized.recipes import decode_recipe
from orchestrator.model.checkpoint import CheckpointIndex

_KEYS = ("quantization_config", "compression_config")


def with_encodings(index: CheckpointIndex, described: Described | None, url: str) -> CheckpointIndex:
    """Return the index of a source with its quantized weights joined; unchanged if it describes no quantization.

    The config loses the description: the tensors are those of the unquantized model. Raises QuantizationError, SourceCorruptError.
    """
    if described is None:
        return index
    recipe = decode_recipe(described.method, described.content, described.where)
    weights = encoded(index.tensors, recipe, url, MODEL_DTYPES[_dtype(index.config)])
    config = {key: value for key, value in index.config.items() if key not in _KEYS}
    found = replace(index, tensors=weights.tensors, left_out=weights.left_out, config=config)
    if all(tensor.encoding is None for tensor in weights.tensors.values()):
        warning = f"{described.where} describes {recipe.algorithm}, but no tensor is quantized: the tensors are read as they are"
        return replace(found, warnings=(*index.warnings, warning))
    return replace(found, algorithm=recipe.algorithm, activation_limit=recipe.activation_limit)


def _dtype(config: Mapping[str, Any]) -> str:
    """Return the model's dtype, which config.json names; bfloat16 if it does not."""
    nested = config.get("text_config")
    places = (config, nested if isinstance(nested, dict) else {})
    names = [str(place.get(key)).removeprefix("torch.") for place in places for key in ("dtype", "torch_dtype")]
    return next((name for name in names if name in MODEL_DTYPES), "bfloat16")
