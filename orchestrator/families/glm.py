"""GLM-4.5 to 4.7: mixtures behind a few dense layers, a sigmoid router with a selection bias and groups, a shared expert."""

from __future__ import annotations

from orchestrator.families.common import (
    ATTENTION,
    EMBEDDING,
    GATED_MLP,
    IGNORED,
    NO_CAPS,
    NO_WINDOWS,
    ONE_ACTIVATION,
    PRE_NORMS,
    PREDICTOR,
    experts,
    final,
    qk_norms,
    shared_expert,
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
