"""Mistral: Llama's tensors, with a sliding window. Ministral 3: without one, and with queries scaled by position."""

from __future__ import annotations

from orchestrator.families.common_keys import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.llama import LLAMA
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

ALWAYS_USED = {
    "use_sliding_window": PassedOver("sliding_window alone decides", (None, True)),
    "max_window_layers": PassedOver("all layers have the window, or none", None),
    "layer_types": PassedOver("all layers have the window, or none"),
    "sliding_window_pattern": PassedOver("all layers have the window, or none"),
}
"""Window keys of Mistral, Mixtral and Phi-3, where all layers have the window of sliding_window."""

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        model_types=("mistral",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "sliding_window": 4096,
        },
        nullable=frozenset({"head_dim", "sliding_window"}),
        windows="all",
        passed_over={**ALWAYS_USED, **NO_CAPS, **ONE_ACTIVATION},
    ),
)

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MINISTRAL3 = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        model_types=("ministral3",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": False,
            "sliding_window": None,
        },
        nullable=frozenset({"sliding_window"}),
        windows="all",
        rotary=RotaryTable(theta=10_000.0, kinds=("yarn",), parameters=_YARN, scales_queries=True),
        passed_over={**ALWAYS_USED, **NO_CAPS, **ONE_ACTIVATION},
    ),
)
