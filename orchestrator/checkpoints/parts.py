"""The language model within a larger model (with a vision tower), as a checkpoint of its own: its config, its tensors' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.model.checkpoint import CheckpointIndex, TensorInfo

WRAPPERS = ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration", "Mistral3ForConditionalGeneration")
"""Architectures whose language model is one of the families, whole, and is read from the larger checkpoint."""
ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
}
"""model_type of text_config -> architecture."""
_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
"""Prefix of the language model's tensors -> what it is without the larger model."""
_HEAD = "lm_head.weight"
_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")
"""Keys that may stand beside text_config."""
_REASON = "it belongs to another part of the model than its language model"


def language_model(index: CheckpointIndex) -> CheckpointIndex:
    """Return the index of the language model alone; unchanged if `index` is of one, or of a larger model that is not known."""
    listed, text = index.config.get("architectures"), index.config.get("text_config")
    if not isinstance(text, Mapping) or not listed or listed[0] not in WRAPPERS or text.get("model_type") not in ARCHITECTURES:
        return index
    tensors: dict[str, TensorInfo] = {}
    others: dict[str, str] = {}
    for name, tensor in index.tensors.items():
        own = _own_name(name)
        if own is None:
            others[name] = _REASON
        else:
            tensors[own] = replace(tensor, name=own)
    warning = f"only the language model of {listed[0]} is built: {len(others)} tensors of its other parts are left out"
    return replace(
        index,
        tensors=tensors,
        config=_config(index.config, text),
        left_out={**index.left_out, **others},
        warnings=(*index.warnings, warning),
    )


def _own_name(name: str) -> str | None:
    """Return a tensor's name in the language model alone; None: it is of another part."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name if name == _HEAD else None


def _config(outer: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the language model. Whether its head is tied is said by the larger model, as in transformers."""
    found = {key: outer[key] for key in _OUTER if key in outer} | {"architectures": [ARCHITECTURES[text["model_type"]]]}
    found |= {key: value for key, value in text.items() if key not in ("architectures", "quantization_config")}
    if "tie_word_embeddings" in outer:
        found["tie_word_embeddings"] = outer["tie_word_embeddings"]
    return found
