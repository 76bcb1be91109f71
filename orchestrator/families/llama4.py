"""Llama 4's language model: chunks instead of windows, no rotary embedding in every fourth layer, experts weighed at their input.

Layers with rotary embedding attend within chunks and norm their rotated heads; the others see all, and scale queries by position.
"""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, final, renamed
from orchestrator.families.common_experts import fused_experts, shared_expert
from orchestrator.families.common_keys import ATTENTION_BIASES, JITTER, NO_CAPS, ONE_ACTIVATION
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_DECIDE = "no_rope_layers or layer_types decide"

LLAMA4 = Family(
    name="llama4",
    architectures=("Llama4ForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        *ATTENTION,
        PRE_NORMS[1],
        *renamed(GATED_MLP, {"mlp.": "feed_forward."}),
        *fused_experts("feed_forward.router", "feed_forward.experts", transposed=True),
        *shared_expert("feed_forward.shared_expert"),
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("llama4_text",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "intermediate_size_mlp": 16384,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "moe_layers": None,
            "interleave_moe_layer_step": 1,
            "use_qk_norm": True,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8192,
            "layer_types": None,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
        },
        nullable=frozenset({"moe_layers", "no_rope_layers", "layer_types"}),
        constants={"rotary_interleaved": True, "chunked_windows": True, "qk_norm_after_rotary": True},
        derived={
            **ATTENTION_BIASES,
            "qk_layernorm": ("where_rotated", "use_qk_norm"),
        },
        dense_size="intermediate_size_mlp",
        windows="with_rotary",
        window_key="attention_chunk_size",
        window_kind="chunked_attention",
        rotary=RotaryTable(
            theta=500_000.0,
            layers="no_rope_layers",
            no_layers_mean_default=True,
            temperature=("attn_temperature_tuning", "floor_scale", "attn_scale"),
        ),
        experts=ExpertTable(
            "num_local_experts",
            "intermediate_size",
            shared_size="intermediate_size",
            layers="interleaved",
            constants={
                "scoring": "sigmoid_of_chosen",
                "normalization_mode": 0,
                "weighs_input": True,
                "shared_expert_gate": False,
            },
        ),
        passed_over={
            **NO_CAPS,
            **JITTER,
            **ONE_ACTIVATION,
            "for_llm_compressor": PassedOver("how another program stores the experts"),
            **{key: PassedOver(_DECIDE) for key in ("sliding_window", "use_sliding_window")},
            **{key: PassedOver(_DECIDE, None) for key in ("max_window_layers", "sliding_window_pattern")},
            "norm_topk_prob": PassedOver("weights are sigmoids", (None, False)),
        },
    ),
)
