"""Granite: Llama's tensors, with multipliers on embedding, attention, residuals and logits."""

from __future__ import annotations

from orchestrator.core.rules import ConfigTable, Family
from orchestrator.families.llama import LLAMA

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "attention_multiplier": 1.0},
        derived={
            "embedding_multiplier": ("is", "embedding_multiplier"),
            "attention_scale": ("is", "attention_multiplier"),
            "residual_multiplier": ("is", "residual_multiplier"),
            "logits_scaling": ("is", "logits_scaling"),
        },
    ),
)
