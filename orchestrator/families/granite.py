"""Granite: Llama's tensors, with multipliers on embedding, attention, residuals and logits."""

from __future__ import annotations

from orchestrator.families.llama import LLAMA, LLAMA_BIASES
from orchestrator.model.rules import ConfigTable, Family

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        model_types=("granite",),
        defaults={
            **LLAMA.config.defaults,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        nullable=frozenset({"num_key_value_heads"}),
        derived={
            **LLAMA_BIASES,
            "embedding_multiplier": ("is", "embedding_multiplier"),
            "attention_scale": ("is", "attention_multiplier"),
            "residual_multiplier": ("is", "residual_multiplier"),
            "logits_scaling": ("is", "logits_scaling"),
        },
        passed_over=LLAMA.config.passed_over,
    ),
)
