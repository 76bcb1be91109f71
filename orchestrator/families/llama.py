"""Llama 1 to 3."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, final
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.model.rules import ConfigTable, Family

LLAMA_BIASES = {
    **ATTENTION_BIASES,
    "mlp_bias": ("is", "mlp_bias"),
}
LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("llama",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        },
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        derived=LLAMA_BIASES,
        whole_heads=True,
        passed_over={**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION},
    ),
)
