"""DeepSeek V3 and R1, and the text models of Kimi K2: latent attention (MLA), mixtures behind a few dense layers."""

from __future__ import annotations

from orchestrator.families.common import EMBEDDING, GATED_MLP, IGNORED, LATENT_ATTENTION, PRE_NORMS, PREDICTOR, final
from orchestrator.families.common_keys import (
    LATENT_DEFAULTS,
    LATENT_DERIVED,
    LATENT_PASSED_OVER,
    NO_CAPS,
    NO_WINDOWS,
    ONE_ACTIVATION,
)
from orchestrator.families.glm import SIGMOID_EXPERTS, SIGMOID_TABLE
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_FURTHER = PassedOver("layers that predict further tokens are not built", None)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *LATENT_ATTENTION, PRE_NORMS[1], *GATED_MLP, *SIGMOID_EXPERTS, *final()),
    ignored=(*IGNORED, *PREDICTOR),
    config=ConfigTable(
        model_types=("deepseek_v3", "kimi_k2"),
        defaults={
            **LATENT_DEFAULTS,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 3,
        },
        nullable=frozenset({"num_key_value_heads", "q_lora_rank", "norm_topk_prob", "rope_interleave"}),
        derived=LATENT_DERIVED,
        latent=True,
        rotary=RotaryTable(kinds=("default", "yarn"), scales_softmax=True),
        experts=SIGMOID_TABLE,
        passed_over={
            **LATENT_PASSED_OVER,
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
            "num_mtp_layers": _FURTHER,
            "num_nextn_predict_layers": _FURTHER,
        },
    ),
)
