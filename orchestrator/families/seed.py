"""Seed-OSS: Llama's tensors, with biases on queries, keys and values only."""

from __future__ import annotations

from orchestrator.families.llama import LLAMA
from orchestrator.model.rules import ConfigTable, Family

SEED_OSS = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        model_types=("seed_oss",),
        defaults={
            **LLAMA.config.defaults,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
        },
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        derived={
            "attn_bias": ("is", "attention_bias"),
            "attn_dense_bias": ("is", "attention_out_bias"),
            "mlp_bias": ("is", "mlp_bias"),
        },
        passed_over=LLAMA.config.passed_over,
    ),
)
