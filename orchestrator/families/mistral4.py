"""Mistral Small 4: latent attention (MLA) with queries scaled by position, mixtures with a softmax router in groups."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import EMBEDDING, GATED_MLP, IGNORED, LATENT_ATTENTION, PRE_NORMS, final
from orchestrator.families.common_experts import fused_experts, shared_expert
from orchestrator.families.common_keys import (
    LATENT_DEFAULTS,
    LATENT_DERIVED,
    LATENT_PASSED_OVER,
    NO_CAPS,
    NO_WINDOWS,
    ONE_ACTIVATION,
)
from orchestrator.families.glm import SIGMOID_TABLE
from orchestrator.model.config_table import RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_EXPERTS = (*fused_experts("mlp.gate", "mlp.experts"), *shared_expert("mlp.shared_experts"))
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}

MISTRAL4 = Family(
    name="mistral4",
    architectures=("Mistral4ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *LATENT_ATTENTION, PRE_NORMS[1], *GATED_MLP, *_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("mistral4",),
        defaults={
            **LATENT_DEFAULTS,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1048576,
            "num_key_value_heads": 32,
            "q_lora_rank": 1024,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 128,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
            "first_k_dense_replace": 0,
        },
        nullable=frozenset({"num_key_value_heads", "q_lora_rank", "norm_topk_prob", "rope_interleave"}),
        derived=LATENT_DERIVED,
        latent=True,
        rotary=RotaryTable(kinds=("yarn",), parameters=_YARN, partial=True, scales_queries=True),
        experts=replace(SIGMOID_TABLE, constants={"sum_epsilon": 1e-20, "shared_expert_gate": False}),
        passed_over={**LATENT_PASSED_OVER, **NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION},
        # huggingface/transformers#47435; sgl-project/sglang#26203
        doubts={
            (
                "model_type",
                "mistral4",
            ): "mscale_all_dim does not scale its scores here, as in transformers 5.14 and in SGLang's reading "
            "of the publisher's own files; transformers 5.17 scales them"
        },
    ),
)
