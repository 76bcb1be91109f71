"""Tencent's Hy3: mixtures in the manner of DeepSeek V3, with normed heads, behind one dense layer."""

from __future__ import annotations

from dataclasses import replace

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
from orchestrator.families.glm import SIGMOID_TABLE
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_BIASES = {"attn_bias": ("is", "attention_bias"), "attn_dense_bias": ("is", "attention_bias")}

HY3 = Family(
    name="hy_v3",
    architectures=("HYV3ForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        *ATTENTION,
        *qk_norms(),
        PRE_NORMS[1],
        *GATED_MLP,
        *experts("mlp.router.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj", bias="mlp.expert_bias"),
        *shared_expert("mlp.shared_mlp"),
        *final(),
    ),
    ignored=(*IGNORED, *PREDICTOR),
    config=ConfigTable(
        model_types=("hy_v3",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "moe_intermediate_size": 1536,
            "num_experts": 192,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
            "router_scaling_factor": 2.826,
            "mlp_layer_types": None,
        },
        nullable=frozenset({"mlp_layer_types"}),
        constants={"qk_layernorm": "head"},
        derived=_BIASES,
        rotary=RotaryTable(theta=11_158_840.0),
        experts=replace(
            SIGMOID_TABLE,
            count="num_experts",
            normalized=None,
            shared_count="num_shared_experts",
            layers="listed",
            groups=None,
            routed_scale="router_scaling_factor",
        ),
        passed_over={
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
            "enable_moe_fp32_combine": PassedOver("the dtype in which the shared expert is added", None),
            "first_k_dense_replace": PassedOver("mlp_layer_types decides; without it, all but the first have experts", (None, 1)),
            "num_nextn_predict_layers": PassedOver("layers that predict further tokens are not built", None),
            "moe_router_use_sigmoid": PassedOver("scores are sigmoids", (None, True)),
            "moe_router_enable_expert_bias": PassedOver("experts are chosen by a bias", (None, True)),
            "route_norm": PassedOver("the chosen weights always sum to one", (None, True)),
            "qk_norm": PassedOver("queries and keys are always normed", (None, True)),
            "expert_hidden_dim": PassedOver("moe_intermediate_size says the same", None),
            "enable_lm_head_fp32": PassedOver("the dtype of the head", None),
            "enable_attention_fp32_softmax": PassedOver("the dtype of the softmax", None),
        },
    ),
)
