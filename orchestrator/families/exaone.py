"""EXAONE 4 and K-EXAONE: normed heads, and rotary embedding only in the layers with a window.

EXAONE 4 has norms after attention and MLP; K-EXAONE has them before, and experts in the manner of DeepSeek V3.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import DENSE, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, QKV, final, norm, qk_norms, renamed
from orchestrator.families.common_keys import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.glm import SIGMOID_EXPERTS, SIGMOID_TABLE
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import PREDICTS_FURTHER, ConfigTable, Family, Ignored

_FURTHER = PassedOver("layers that predict further tokens are not built", None)

EXAONE4 = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    rules=(
        *EMBEDDING,
        QKV,
        DENSE,
        *qk_norms(),
        norm("post_layernorm", "post_attention_layernorm"),
        *GATED_MLP,
        norm("post_feedforward_layernorm", "post_feedforward_layernorm"),
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("exaone4",),
        defaults={
            "num_key_value_heads": 32,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        nullable=frozenset({"sliding_window", "sliding_window_pattern", "layer_types"}),
        constants={"norm_placement": "post", "qk_layernorm": "head"},
        windows="pattern",
        rotary=RotaryTable(only_windows=True),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
        },
    ),
)
EXAONE_MOE = Family(
    name="exaone_moe",
    architectures=("ExaoneMoeForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        QKV,
        DENSE,
        *qk_norms(),
        PRE_NORMS[1],
        *GATED_MLP,
        *renamed(SIGMOID_EXPERTS, {"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"}),
        *final(),
    ),
    ignored=(*IGNORED, Ignored("mtp.*", PREDICTS_FURTHER)),
    config=replace(
        EXAONE4.config,
        model_types=("exaone_moe",),
        defaults={
            **EXAONE4.config.defaults,
            "moe_intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "mlp_layer_types": None,
        },
        nullable=frozenset({"sliding_window_pattern", "layer_types", "mlp_layer_types"}),
        constants={"qk_layernorm": "head"},
        experts=replace(SIGMOID_TABLE, count="num_experts", alias=None, shared_count="num_shared_experts", layers="listed"),
        passed_over={
            **EXAONE4.config.passed_over,
            "scoring_func": PassedOver("scores are sigmoids", (None, "sigmoid")),
            "topk_method": PassedOver("experts are chosen by groups and bias", (None, "noaux_tc")),
            "num_nextn_predict_layers": _FURTHER,
        },
    ),
)
