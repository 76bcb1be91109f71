"""OLMoE: a mixture in every layer, and norms over all queries and all keys at once, as in OLMo 2."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, FULL_QK_NORMS, IGNORED, PRE_NORMS, final
from orchestrator.families.common_experts import experts
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.model.config_table import ExpertTable
from orchestrator.model.rules import ConfigTable, Family

OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        *ATTENTION,
        *FULL_QK_NORMS,
        PRE_NORMS[1],
        *experts("mlp.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj"),
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("olmoe",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        nullable=frozenset({"num_key_value_heads"}),
        constants={"qk_layernorm": "full"},
        derived=ATTENTION_BIASES,
        experts=ExpertTable("num_experts", "intermediate_size", alias="num_local_experts", normalized="norm_topk_prob"),
        passed_over={**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION},
    ),
)
