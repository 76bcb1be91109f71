"""GLM-4.5 to 4.7: mixtures behind a few dense layers, a sigmoid router with a selection bias and groups, a shared expert.

GLM-4.7-Flash has latent attention besides (MLA).
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import (
    ATTENTION,
    EMBEDDING,
    GATED_MLP,
    IGNORED,
    LATENT_ATTENTION,
    PRE_NORMS,
    PREDICTOR,
    final,
    qk_norms,
)
from orchestrator.families.common_experts import experts, shared_expert
from orchestrator.families.common_keys import (
    LATENT_DEFAULTS,
    LATENT_DERIVED,
    LATENT_PASSED_OVER,
    NO_CAPS,
    NO_WINDOWS,
    ONE_ACTIVATION,
)
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

SIGMOID_EXPERTS = (
    *experts("mlp.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj", bias="mlp.gate.e_score_correction_bias"),
    *shared_expert("mlp.shared_experts"),
)
"""Rules of mixtures in the manner of DeepSeek V3."""
SIGMOID_TABLE = ExpertTable(
    "n_routed_experts",
    "moe_intermediate_size",
    alias="num_local_experts",
    normalized="norm_topk_prob",
    shared_count="n_shared_experts",
    layers="after_first",
    groups=("n_group", "topk_group"),
    routed_scale="routed_scaling_factor",
    constants={"scoring": "sigmoid", "selection_bias": True, "sum_epsilon": 1e-20, "shared_expert_gate": False},
)
"""How config.json describes them."""

GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *qk_norms(), PRE_NORMS[1], *GATED_MLP, *SIGMOID_EXPERTS, *final()),
    ignored=(*IGNORED, *PREDICTOR),
    config=ConfigTable(
        model_types=("glm4_moe",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "use_qk_norm": False,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
            "first_k_dense_replace": 1,
        },
        constants={"attn_dense_bias": False},
        derived={"attn_bias": ("is", "attention_bias"), "qk_layernorm": ("per_head", "use_qk_norm")},
        rotary=RotaryTable(partial=True, fraction=0.5),
        experts=SIGMOID_TABLE,
        passed_over={
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
            "num_nextn_predict_layers": PassedOver("layers that predict further tokens are not built", None),
            "num_mtp_layers": PassedOver("layers that predict further tokens are not built", None),
        },
    ),
)
GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *LATENT_ATTENTION, PRE_NORMS[1], *GATED_MLP, *SIGMOID_EXPERTS, *final()),
    ignored=(*IGNORED, *PREDICTOR),
    config=ConfigTable(
        model_types=("glm4_moe_lite",),
        defaults={
            **LATENT_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202752,
            "num_key_value_heads": 20,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1536,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.8,
            "norm_topk_prob": True,
            "mlp_layer_types": None,
        },
        nullable=frozenset({"q_lora_rank", "mlp_layer_types"}),
        derived=LATENT_DERIVED,
        latent=True,
        rotary=RotaryTable(kinds=("default", "yarn"), scales_softmax=True, whole=True),
        experts=replace(SIGMOID_TABLE, layers="listed"),
        passed_over={
            **LATENT_PASSED_OVER,
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
            "first_k_dense_replace": PassedOver(
                "mlp_layer_types decides; without it, all but the first layer have experts", (None, 1)
            ),
            "num_nextn_predict_layers": PassedOver("layers that predict further tokens are not built", None),
        },
    ),
)
