"""CWM: Llama's tensors, with a window in all layers but the first of every four."""

from __future__ import annotations

from orchestrator.families.common_keys import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.llama import LLAMA
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CWM = Family(
    name="cwm",
    architectures=("CwmForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        model_types=("cwm",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "mlp_bias": False,
            "sliding_window": 8192,
            "layer_types": None,
        },
        nullable=frozenset({"layer_types"}),
        derived={"mlp_bias": ("is", "mlp_bias")},
        windows="but_first_of_four",
        whole_heads=True,
        rotary=RotaryTable(theta=1_000_000.0, parameters=_SCALED),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
            "sliding_window_pattern": PassedOver("layer_types decides", None),
        },
    ),
)
