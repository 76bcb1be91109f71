"""A tiny seeded model of every family, as a Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.families import FAMILIES
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 40, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

HALF_ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 1000.0}


@dataclass(frozen=True)
class TinyFamily:
    """Which classes of transformers, and which fields differ from BASE."""

    model: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)


TINY: dict[str, TinyFamily] = {
    "llama": TinyFamily("LlamaForCausalLM", "LlamaConfig"),
    "mistral": TinyFamily("MistralForCausalLM", "MistralConfig", {"sliding_window": 5}),
    "ministral3": TinyFamily(
        "Ministral3ForCausalLM",
        "Ministral3Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    "qwen2": TinyFamily("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": TinyFamily("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma": TinyFamily("GemmaForCausalLM", "GemmaConfig", {"tie_word_embeddings": True}),
    "gemma2": TinyFamily(
        "Gemma2ForCausalLM", "Gemma2Config", {"tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 24}
    ),
    "gemma3": TinyFamily(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 24, "num_hidden_layers": 7},
    ),
    "gemma4": TinyFamily(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "num_hidden_layers": 7,
            "num_key_value_heads": 4,
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
        },
    ),
    "phi3": TinyFamily("Phi3ForCausalLM", "Phi3Config", {"original_max_position_embeddings": 64}),
    "granite": TinyFamily("GraniteForCausalLM", "GraniteConfig", GRANITE),
    "olmo2": TinyFamily("Olmo2ForCausalLM", "Olmo2Config"),
    "mixtral": TinyFamily("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": TinyFamily(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}
    ),
    "glm4_moe": TinyFamily(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **MOE,
            "num_experts_per_tok": 3,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "ernie4_5": TinyFamily("Ernie4_5ForCausalLM", "Ernie4_5Config"),
    "ernie4_5_moe": TinyFamily(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_k": 3, "moe_num_experts": 8, "moe_intermediate_size": 32, "moe_num_shared_experts": 2},
    ),
    "dots1": TinyFamily(
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            **MOE,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "solar_open": TinyFamily("SolarOpenForCausalLM", "SolarOpenConfig", {**MOE, "n_routed_experts": 8}),
    "olmoe": TinyFamily("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "flex_olmo": TinyFamily(
        "FlexOlmoForCausalLM", "FlexOlmoConfig", {"num_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 32}
    ),
    "llama4": TinyFamily(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "num_hidden_layers": 5,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "num_local_experts": 8,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 5,
            "floor_scale": 4,
        },
    ),
    "apertus": TinyFamily(
        "ApertusForCausalLM", "ApertusConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    ),
    "smollm3": TinyFamily(
        "SmolLM3ForCausalLM", "SmolLM3Config", {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 5}
    ),
    "glm": TinyFamily("GlmForCausalLM", "GlmConfig"),
    "glm4": TinyFamily("Glm4ForCausalLM", "Glm4Config"),
    "olmo3": TinyFamily("Olmo3ForCausalLM", "Olmo3Config", {"num_hidden_layers": 5, "sliding_window": 5}),
    "exaone4": TinyFamily("Exaone4ForCausalLM", "Exaone4Config", {"num_hidden_layers": 5, "sliding_window": 5}),
    "exaone_moe": TinyFamily(
        "ExaoneMoeForCausalLM",
        "ExaoneMoeConfig",
        {
            **MOE,
            "num_hidden_layers": 5,
            "sliding_window": 5,
            "num_experts_per_tok": 3,
            "num_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_shared_experts": 2,
        },
    ),
    "hy_v3": TinyFamily("HYV3ForCausalLM", "HYV3Config", {**MOE, "num_experts": 8}),
    "hunyuan_v1_dense": TinyFamily("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {"rope_parameters": ALPHA}),
    "hunyuan_v1_moe": TinyFamily(
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {"num_experts": 8, "moe_topk": 3, "intermediate_size": 32, "rope_parameters": ALPHA},
    ),
    "granitemoe": TinyFamily(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", {**GRANITE, "num_local_experts": 8, "intermediate_size": 32}
    ),
    "granitemoeshared": TinyFamily(
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {**GRANITE, "num_local_experts": 8, "intermediate_size": 32, "shared_intermediate_size": 48},
    ),
    "afmoe": TinyFamily(
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {**MOE, "num_hidden_layers": 5, "sliding_window": 5, "num_experts": 8, "route_scale": 2.5, "mup_enabled": True},
    ),
    "helium": TinyFamily("HeliumForCausalLM", "HeliumConfig"),
    "cwm": TinyFamily(
        "CwmForCausalLM",
        "CwmConfig",
        {
            "sliding_window": 5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "youtu": TinyFamily("YoutuForCausalLM", "YoutuConfig", LATENT),
    "starcoder2": TinyFamily("Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": 5}),
    "nemotron": TinyFamily("NemotronForCausalLM", "NemotronConfig"),
    "jais2": TinyFamily("Jais2ForCausalLM", "Jais2Config"),
    "cohere": TinyFamily("CohereForCausalLM", "CohereConfig", {"tie_word_embeddings": True}),
    "cohere2": TinyFamily(
        "Cohere2ForCausalLM", "Cohere2Config", {"tie_word_embeddings": True, "num_hidden_layers": 5, "sliding_window": 5}
    ),
    "cohere2_moe": TinyFamily(
        "Cohere2MoeForCausalLM",
        "Cohere2MoeConfig",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 5,
            "sliding_window": 5,
            "intermediate_size": 32,
            "prefix_dense_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 2,
            "expert_selection_fn": "sigmoid",
            "first_k_dense_replace": 1,
        },
    ),
    "arcee": TinyFamily("ArceeForCausalLM", "ArceeConfig"),
    "seed_oss": TinyFamily("SeedOssForCausalLM", "SeedOssConfig"),
    "minimax_m2": TinyFamily(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {"num_experts_per_tok": 3, "num_local_experts": 8, "intermediate_size": 32, "rope_parameters": HALF_ROTATED},
    ),
    "gpt_oss": TinyFamily(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "sliding_window": 5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
    ),
    "mistral4": TinyFamily(
        "Mistral4ForCausalLM",
        "Mistral4Config",
        {
            **LATENT,
            **MOE,
            "head_dim": 20,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "glm4_moe_lite": TinyFamily(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        {**LATENT, **MOE, "n_routed_experts": 8, "n_shared_experts": 1, "attention_bias": True},
    ),
    "deepseek_v3": TinyFamily(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **LATENT,
            **MOE,
            "num_experts_per_tok": 3,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
            },
        },
    ),
    "qwen3_moe": TinyFamily("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MOE, "num_experts": 4, "norm_topk_prob": True}),
    "phimoe": TinyFamily(
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {
            "num_local_experts": 8,
            "intermediate_size": 32,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.2,
            "sliding_window": 5,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * number for number in range(8)],
                "long_factor": [2.0 + 0.3 * number for number in range(8)],
                "short_mscale": 1.2,
                "long_mscale": 1.4,
            },
        },
    ),
    "vaultgemma": TinyFamily(
        "VaultGemmaForCausalLM",
        "VaultGemmaConfig",
        {"tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 24},
    ),
}

PORTABLE = [family for family in TINY if family != "gemma4"]
"""Families whose models may have a portable part: those with caches of one size."""


def fields_of(family: str, **changes: Any) -> dict[str, Any]:
    """The fields of a tiny model's config, with as many factors of longrope as a head has pairs."""
    found = {**BASE, **TINY[family].fields, **changes}
    if "short_factor" in (rotary := found.get("rope_parameters") or {}):
        times = found["head_dim"] // BASE["head_dim"]
        found["rope_parameters"] = {**rotary, **{key: rotary[key] * times for key in ("short_factor", "long_factor")}}
    return found


def tiny_config(family: str, **changes: Any) -> ModelConfig:
    """The tiny model's config as it is planned; `changes` are fields of transformers' config class."""
    import transformers

    tiny = TINY[family]
    made = getattr(transformers, tiny.config)(**fields_of(family, **changes))
    return from_hugging_face(json.loads(made.to_json_string()), tiny.model, "bfloat16", FAMILIES[family].config)


def tiny_config_json(family: str) -> dict[str, Any]:
    """config.json of a family's tiny model, as it could stand on the hub: nothing that transformers adds when it saves."""
    return {"architectures": [TINY[family].model], **fields_of(family)}


def write_tiny(family: str, folder: Path, *, seed: int = 11, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Write a seeded model (no tokenizer) of `family`; `changes` are config fields. Weights are large enough to matter."""
    import torch
    import transformers

    torch.manual_seed(seed)
    tiny = TINY[family]
    config = getattr(transformers, tiny.config)(**fields_of(family, **changes))
    model: Any = getattr(transformers, tiny.model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("scale"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        for name, buffer in model.named_buffers():
            if name in model.state_dict():
                buffer.copy_(float(name.endswith("scalar")) + 0.2 * torch.randn_like(buffer))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
