"""A source's config as transformers reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.model.checkpoint import CheckpointIndex


def loadable_config(index: CheckpointIndex) -> dict[str, Any]:
    """Return the config of a source as transformers reads it."""
    return with_rotated_part(with_known_type(index.config))


def with_known_type(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with a `model_type` of transformers, by its architecture if need be.

    Other tools' formats have none. Kimi K2, which is a DeepSeek V3, has one of its own.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.get("model_type") in CONFIG_MAPPING_NAMES:
        return dict(config)
    (architecture,) = config["architectures"]
    kinds = [kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
    return {**config, "model_type": kinds[0] if kinds else config.get("model_type", "")}


def with_rotated_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the rotated part of a head as transformers reads it.

    MiniMax M2 names the number of rotated elements, which transformers up to 5.16 passes over and then rotates whole heads
    (huggingface/transformers#48241).
    """
    dim, head = config.get("rotary_dim"), config.get("head_dim")
    if config.get("model_type") != "minimax_m2" or dim is None or head is None:
        return dict(config)
    return {"partial_rotary_factor": dim / head, **config}


def causal_class(config: Any) -> Any:
    """Return transformers' causal LM of a config object; None: there is none.

    transformers 5.14 has Mistral 4's, but not in its table of causal LMs.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return getattr(transformers, f"{type(config).__name__.removesuffix('Config')}ForCausalLM", None)


class LayerNames:
    """Names of source tensors within a layer of transformers, which renames some when it loads (`conversion_mapping`)."""

    def __init__(self, model_type: str) -> None:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        found = get_checkpoint_conversion_mapping(model_type) or ()
        self._renamings = [each for each in found if isinstance(each, WeightRenaming)]

    def __call__(self, name: str) -> str:
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name.split(".", 3)[3]
