"""Mistral: Llama's tensors, with a sliding window."""

from __future__ import annotations

from orchestrator.core.rules import ConfigTable, Family
from orchestrator.families.llama import LLAMA

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8}
    ),
)
