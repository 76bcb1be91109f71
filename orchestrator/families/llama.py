"""Llama 1 to 3."""

from __future__ import annotations

from orchestrator.core.rules import ConfigTable, Family
from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, final

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
)
