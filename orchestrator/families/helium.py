"""Helium: Llama's tensors, with neighbouring elements of a head rotated together."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import DENSE, EMBEDDING, GATED_MLP, PRE_NORMS, QKV, QKV_BIAS, final
from orchestrator.families.llama import LLAMA
from orchestrator.model.config_table import RotaryTable
from orchestrator.model.rules import Family

HELIUM = Family(
    name="helium",
    architectures=("HeliumForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], QKV, QKV_BIAS, DENSE, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=LLAMA.ignored,
    config=replace(
        LLAMA.config,
        model_types=("helium",),
        defaults={
            **LLAMA.config.defaults,
            "num_key_value_heads": 20,
            "head_dim": 128,
            "rms_norm_eps": 1e-8,
            "max_position_embeddings": 4096,
        },
        nullable=frozenset(),
        constants={"rotary_interleaved": True},
        derived={"attn_bias": ("is", "attention_bias"), "mlp_bias": ("is", "mlp_bias")},
        whole_heads=False,
        queries_fill_hidden=True,
        rotary=RotaryTable(theta=100_000.0),
    ),
)
