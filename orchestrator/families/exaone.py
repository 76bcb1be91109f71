"""EXAONE 4: norms after attention and MLP, normed heads, and rotary embedding only in the layers with a window."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, NO_CAPS, ONE_ACTIVATION, final, norm, qk_norms
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

EXAONE4 = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    rules=(
        *EMBEDDING,
        *ATTENTION,
        *qk_norms(),
        norm("post_layernorm", "post_attention_layernorm"),
        *GATED_MLP,
        norm("post_feedforward_layernorm", "post_feedforward_layernorm"),
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("exaone4",),
        defaults={
            "num_key_value_heads": 32,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        nullable=frozenset({"sliding_window", "sliding_window_pattern", "layer_types"}),
        constants={"norm_placement": "post", "qk_layernorm": "head"},
        windows="pattern",
        rotary=RotaryTable(only_windows=True),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
        },
    ),
)
