"""Mixtral: Mistral's attention, experts instead of the MLP."""

from __future__ import annotations

from orchestrator.core.rules import ConfigTable, Family
from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, experts, final

_EXPERTS = experts("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}.", "w3", "w1", "w2")

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    ),
)
