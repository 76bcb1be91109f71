"""Youtu: DeepSeek V3's latent attention (MLA) in a model without experts."""

from __future__ import annotations

from orchestrator.families.common import EMBEDDING, GATED_MLP, IGNORED, LATENT_ATTENTION, PRE_NORMS, final
from orchestrator.families.common_keys import (
    LATENT_DEFAULTS,
    LATENT_DERIVED,
    LATENT_PASSED_OVER,
    NO_CAPS,
    NO_WINDOWS,
    ONE_ACTIVATION,
)
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

YOUTU = Family(
    name="youtu",
    architectures=("YoutuForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *LATENT_ATTENTION, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("youtu",),
        defaults={
            **LATENT_DEFAULTS,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 16,
            "tie_word_embeddings": True,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        nullable=frozenset({"q_lora_rank", "rope_interleave"}),
        derived=LATENT_DERIVED,
        latent=True,
        rotary=RotaryTable(kinds=("default", "yarn"), scales_softmax=True),
        passed_over={
            **LATENT_PASSED_OVER,
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
            "mlp_bias": PassedOver("the linears of its MLP have no biases"),
            "embedding_initializer_range": PassedOver("it matters in training only", None),
        },
    ),
)
