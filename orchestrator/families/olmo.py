"""OLMo 2: norms after attention and MLP instead of before, and norms over all queries and all keys at once."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, FULL_QK_NORMS, GATED_MLP, IGNORED, final, norm
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.model.rules import ConfigTable, Family

OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    rules=(
        *EMBEDDING,
        *ATTENTION,
        *FULL_QK_NORMS,
        norm("post_layernorm", "post_attention_layernorm"),
        *GATED_MLP,
        norm("post_feedforward_layernorm", "post_feedforward_layernorm"),
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("olmo2",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "attention_bias": False,
        },
        nullable=frozenset({"num_key_value_heads"}),
        constants={"norm_placement": "post", "qk_layernorm": "full"},
        derived=ATTENTION_BIASES,
        passed_over={**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION},
    ),
)
