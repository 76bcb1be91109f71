"""A source's config as transformers reads it."""

from __future__ import annotations

from typing import Any

from orchestrator.model.checkpoint import CheckpointIndex


def loadable_config(index: CheckpointIndex) -> dict[str, Any]:
    """Return the config with transformers' `model_type`, which other tools' formats lack."""
    if "model_type" in index.config:
        return dict(index.config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    (architecture,) = index.config["architectures"]
    kinds = [kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
    return {"model_type": kinds[0] if kinds else "", **index.config}
