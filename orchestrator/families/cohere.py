"""Cohere's Command: LayerNorms without bias, attention and MLP side by side, pairs of neighbours rotated, scaled logits.

Cohere 2 has windows, and rotates only the layers that have one; Cohere 2 MoE has experts in place of most MLPs.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, final
from orchestrator.families.common_experts import experts, shared_expert
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_OF_OTHER_CODE = {
    "use_parallel_block": PassedOver("attention and MLP are side by side", (None, True)),
    "use_gated_activation": PassedOver("the MLP has a gate", (None, True)),
    "use_embedding_sharing": PassedOver("tie_word_embeddings decides", (None, True)),
    "use_parallel_embedding": PassedOver("how the publisher split the model", None),
    "position_embedding_type": PassedOver("neighbours are rotated", (None, "rope_gptj")),
    "layer_switch": PassedOver("sliding_window_pattern or layer_types decide", None),
    "rotary_pct": PassedOver("whole heads are rotated", (None, 1.0)),
}
"""Keys of Cohere's own code that transformers does not read."""

COHERE = Family(
    name="cohere",
    architectures=("CohereForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("cohere",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "attention_bias": False,
        },
        nullable=frozenset({"num_key_value_heads"}),
        constants={"norm_kind": "layer", "parallel_blocks": True, "rotary_interleaved": True},
        derived={
            **ATTENTION_BIASES,
            "logits_scaling": ("inverse", "logit_scale"),
        },
        epsilon="layer_norm_eps",
        rotary=RotaryTable(theta=500_000.0),
        passed_over={**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION, **_OF_OTHER_CODE},
    ),
)
COHERE2 = replace(
    COHERE,
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    config=replace(
        COHERE.config,
        model_types=("cohere2",),
        defaults={**COHERE.config.defaults, "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 4},
        nullable=COHERE.config.nullable | {"sliding_window", "layer_types"},
        windows="pattern",
        rotary=RotaryTable(only_windows=True),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            **_OF_OTHER_CODE,
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
            "order_of_interleaved_layers": PassedOver("layer_types decides", None),
        },
    ),
)
COHERE2_MOE = replace(
    COHERE2,
    name="cohere2_moe",
    architectures=("Cohere2MoeForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        *ATTENTION,
        *GATED_MLP,
        *experts("mlp.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj"),
        *shared_expert("mlp.shared_experts"),
        *final(),
    ),
    config=replace(
        COHERE2.config,
        model_types=("cohere2_moe",),
        defaults={
            **COHERE2.config.defaults,
            "head_dim": 128,
            "rms_norm_eps": None,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 0,
            "shared_expert_combination_strategy": "average",
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "mlp_layer_types": None,
            "first_k_dense_replace": 0,
            "prefix_dense_intermediate_size": None,
            "prefix_dense_sliding_window_pattern": 1,
        },
        nullable=COHERE2.config.nullable | {"rms_norm_eps", "mlp_layer_types", "prefix_dense_intermediate_size"},
        constants={"parallel_blocks": True, "rotary_interleaved": True},
        rms_epsilon="rms_norm_eps",
        dense_size="prefix_dense_intermediate_size",
        windows="after_prefix",
        rotary=RotaryTable(only_windows=True, complete=True, dense_too="prefix_dense_sliding_window_pattern"),
        experts=ExpertTable(
            "num_experts",
            "intermediate_size",
            selection="expert_selection_fn",
            combination="shared_expert_combination_strategy",
            normalized="norm_topk_prob",
            shared_count="num_shared_experts",
            layers="listed",
            constants={"shared_expert_gate": False},
        ),
    ),
)
