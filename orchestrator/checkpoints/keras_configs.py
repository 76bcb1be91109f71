"""Fields of KerasHub's backbones as config.json of the same model: what differs by family.

Each function gets the fields of a backbone's config. Raises ArchitectureError for what is not known of the family, and TypeError,
ValueError or KeyError for a field that is missing or of another type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.base.errors import ArchitectureError


def llama(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 1 to 3."""
    factor, linear = fields.get("rope_frequency_adjustment_factor"), fields.get("rope_position_scaling_factor", 1.0)
    scaling: dict[str, Any] | None = None
    if factor is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": fields["rope_low_freq_factor"],
            "high_freq_factor": fields["rope_high_freq_factor"],
            "original_max_position_embeddings": fields["rope_pretraining_sequence_length"],
        }
        if linear != 1.0:
            raise ArchitectureError("rope_position_scaling_factor beside rope_frequency_adjustment_factor is not supported")
    elif linear != 1.0:
        scaling = _linear(linear)
    return {
        **_named("LlamaForCausalLM", "llama"),
        "hidden_act": "silu",
        "rope_theta": float(fields["rope_max_wavelength"]),
        "rope_scaling": scaling,
    }


def llama_context(fields: Mapping[str, Any]) -> int:
    """Return the longest context of the family's models."""
    if fields.get("rope_frequency_adjustment_factor"):
        return 131072
    return 8192 if float(fields["rope_max_wavelength"]) == 500000.0 else 4096


def mistral(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral."""
    return {
        **_named("MistralForCausalLM", "mistral"),
        "hidden_act": "silu",
        **_rotary(fields),
        **({"head_dim": fields["head_dim"]} if fields.get("head_dim") else {}),
        "sliding_window": fields.get("sliding_window"),
    }


def qwen2(fields: Mapping[str, Any]) -> dict[str, Any]:
    """KerasHub has the window in every layer."""
    window = bool(fields.get("use_sliding_window_attention"))
    return {
        **_named("Qwen2ForCausalLM", "qwen2"),
        "hidden_act": "silu",
        **_rotary(fields),
        **_window(fields.get("sliding_window_size") if window else None),
    }


def qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen 3."""
    return {
        **_named("Qwen3ForCausalLM", "qwen3"),
        "hidden_act": "silu",
        **_rotary(fields),
        "head_dim": fields["head_dim"] or fields["hidden_dim"] // fields["num_query_heads"],
        **_window(fields.get("sliding_window_size") or None),
    }


def _window(size: int | None) -> dict[str, Any]:
    return {} if size is None else {"use_sliding_window": True, "sliding_window": size, "max_window_layers": 0}


def gemma(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 1. `intermediate_dim` counts gate and up."""
    if not fields.get("query_head_dim_normalize", True):
        raise ArchitectureError("query_head_dim_normalize: false is not known of Gemma 1")
    return {
        **_named("GemmaForCausalLM", "gemma"),
        "hidden_act": "gelu_pytorch_tanh",
        "head_dim": fields["head_dim"],
        "intermediate_size": fields["intermediate_dim"] // 2,
        "rope_theta": 10000.0,
    }


def gemma2(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 2."""
    return {
        **_named("Gemma2ForCausalLM", "gemma2"),
        "intermediate_size": fields["intermediate_dim"] // 2,
        "rope_theta": 10000.0,
        **_later_gemma(fields, lambda layer: layer % 2 == 0),
        "attn_logit_softcapping": fields["attention_logit_soft_cap"],
    }


def gemma3(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3 of text."""
    for name in ("vision_encoder", "is_embedding_model", "use_bidirectional_attention", "attention_logit_soft_cap"):
        if fields.get(name):
            raise ArchitectureError(f"a Gemma 3 with {name} is not read", "Text models without it are.")
    for name in ("use_query_key_norm", "use_post_ffw_norm", "use_post_attention_norm"):
        if not fields.get(name):
            raise ArchitectureError(f"a Gemma 3 without {name} is not known")
    scales = {name: fields.get(f"{name}_rope_scaling_factor", 1.0) for name in ("global", "local")}
    if scales["local"] != 1.0:
        raise ArchitectureError(f"local_rope_scaling_factor {scales['local']} is not known of Gemma 3")
    full = {"rope_type": "default"} if scales["global"] == 1.0 else _linear(scales["global"])
    return {
        **_named("Gemma3ForCausalLM", "gemma3_text"),
        **_later_gemma(fields, lambda layer: layer % 6 < 5),
        "rope_parameters": {
            "full_attention": {**full, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }


def _later_gemma(fields: Mapping[str, Any], has_window: Callable[[int], bool]) -> dict[str, Any]:
    """Return keys of Gemma 2 and 3. The scale of queries is 1/sqrt(head_dim), or 1/sqrt(hidden_dim / heads)."""
    per_head = fields["query_head_dim_normalize"]
    window = fields["use_sliding_window_attention"]
    kinds = ["sliding_attention" if window and has_window(layer) else "full_attention" for layer in range(fields["num_layers"])]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": fields["head_dim"],
        "query_pre_attn_scalar": fields["head_dim"] if per_head else fields["hidden_dim"] // fields["num_query_heads"],
        "final_logit_softcapping": fields["final_logit_soft_cap"],
        "sliding_window": fields["sliding_window_size"],
        "layer_types": kinds,
    }


def _named(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    factor = fields.get("rope_scaling_factor", 1.0)
    return {"rope_theta": float(fields["rope_max_wavelength"]), "rope_scaling": None if factor == 1.0 else _linear(factor)}


def _linear(factor: float) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": float(factor)}
