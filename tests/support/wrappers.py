"""Tiny larger models (vision, speech) of transformers around a language model of one of the families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.families import BASE, LATENT, MOE, TINY

_SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16, "num_heads": 2, "depth": 1, "out_hidden_size": 64, "embed_dim": 32, "num_filters": 4,
    "encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 32, "encoder_attention_heads": 2,
}  # fmt: skip
"""Sizes of a vision tower or an encoder of speech, under the names of whatever class."""
_PARTS = ("vision_config", "audio_config", "encoder_config", "projector_config", "high_res_vision_config")
_AXES = {"rope_type": "default", "rope_theta": 10000.0}
TEXTS: dict[str, dict[str, Any]] = {
    "Gemma4": TINY["gemma4"].fields,
    "Glm4v": {"rope_parameters": {**_AXES, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "Glm4vMoe": {
        **MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "rope_parameters": {**_AXES, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    },
    "GraniteSpeech": {"model_type": "granite", "embedding_multiplier": 3.0},
    "Kimi_K25": {**LATENT, **MOE, "n_routed_experts": 8, "n_group": 1, "topk_group": 1},
    "Llama4": TINY["llama4"].fields,
    "Qwen2VL": {"rope_parameters": {**_AXES, "mrope_section": [4, 2, 2]}},
    "Qwen3VLMoe": {**MOE, "num_experts": 8, "rope_parameters": {**_AXES, "mrope_section": [4, 2, 2]}},
    "Qwen2_5_VL": {"rope_parameters": {**_AXES, "mrope_section": [4, 2, 2]}},
}  # fmt: skip
"""What the language model of a larger model has beside BASE."""


def new_wrapper(architecture: str, **outer: Any) -> Any:
    """A seeded model of transformers' class of this name, in float32; `outer` are fields of its config."""
    import torch
    import transformers

    kind = getattr(transformers, architecture)
    defaults = kind.config_class()
    text = defaults.text_config
    own = TEXTS.get(architecture.removesuffix("ForConditionalGeneration"), {})
    parts: dict[str, Any] = {"text_config": {**BASE, "model_type": text.model_type, **own}, **outer}
    for name in _PARTS:
        part = getattr(defaults, name, None)
        if part is not None:
            small = {key: value for key, value in _SMALL.items() if hasattr(part, key)}
            parts[name] = {**small, "model_type": part.model_type}
    torch.manual_seed(0)
    return kind(kind.config_class(**parts)).float().eval()


def write_wrapper(architecture: str, folder: Path, **outer: Any) -> Any:
    """Save `new_wrapper` to `folder`, as transformers does, and return it as transformers loads it."""
    import torch

    made = new_wrapper(architecture, **outer)
    made.save_pretrained(folder)
    return type(made).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
