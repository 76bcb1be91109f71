"""Phi-3: queries, keys and values fused in one source tensor, gate and up in another.

TensorRT-LLM keeps the second fusion, with swapped halves: `mlp.fc` of a rank is its part of up, then its part of gate.
"""

from __future__ import annotations

from orchestrator.families.common import DENSE, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, SOURCE, TARGET, final
from orchestrator.families.common_keys import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.mistral import ALWAYS_USED
from orchestrator.model.config_table import SWIGLU, RotaryTable
from orchestrator.model.rules import COLUMN, HEADS, KV_HEADS, ConfigTable, Family, Part, Rule

_QKV = SOURCE + "self_attn.qkv_proj.weight"
_QKV_SECTIONS = ("q", "kv", "kv")
_GATE_UP = SOURCE + "mlp.gate_up_proj.weight"
_GATE_UP_SECTIONS = ("inter", "inter")

FUSED_GATE_UP = Rule(
    TARGET + "mlp.fc.weight",
    (
        Part(_GATE_UP, ("inter", "hidden"), COLUMN, _GATE_UP_SECTIONS, 1),
        Part(_GATE_UP, ("inter", "hidden"), COLUMN, _GATE_UP_SECTIONS, 0),
    ),
)
"""Rule of gate and up in one source tensor."""

PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        Rule(
            TARGET + "attention.qkv.weight",
            (
                Part(_QKV, ("q", "hidden"), HEADS, _QKV_SECTIONS, 0),
                Part(_QKV, ("kv", "hidden"), KV_HEADS, _QKV_SECTIONS, 1),
                Part(_QKV, ("kv", "hidden"), KV_HEADS, _QKV_SECTIONS, 2),
            ),
        ),
        DENSE,
        PRE_NORMS[1],
        FUSED_GATE_UP,
        GATED_MLP[4],
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("phi3",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "sliding_window": None,
        },
        nullable=frozenset({"num_key_value_heads", "sliding_window"}),
        activations={"silu": SWIGLU, "swish": SWIGLU},
        windows="all",
        rotary=RotaryTable(kinds=("default", "longrope"), aliases={"su": "longrope", "yarn": "longrope"}, partial=True),
        passed_over={**ALWAYS_USED, **NO_CAPS, **ONE_ACTIVATION},
    ),
)
