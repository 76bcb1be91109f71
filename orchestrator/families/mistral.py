"""Mistral: Llama's tensors, with a sliding window."""

from __future__ import annotations

from orchestrator.families.common import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.llama import LLAMA
from orchestrator.model.config_table import PassedOver
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
