"""SmolLM3: Llama's tensors, without rotary embedding in every fourth layer, where a window may be."""

from __future__ import annotations

from orchestrator.families.common_keys import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.llama import LLAMA, LLAMA_BIASES
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        model_types=("smollm3",),
        defaults={
            **LLAMA.config.defaults,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        nullable=frozenset({"num_key_value_heads", "sliding_window", "layer_types", "no_rope_layers"}),
        derived=LLAMA_BIASES,
        windows="without_rotary",
        rotary=RotaryTable(theta=2_000_000.0, layers="no_rope_layers"),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            "max_window_layers": PassedOver("no_rope_layers or layer_types decide", None),
            "sliding_window_pattern": PassedOver("no_rope_layers or layer_types decide", None),
        },
    ),
)
