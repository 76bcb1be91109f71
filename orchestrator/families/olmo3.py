"""OLMo 3: OLMo 2 with a window in all layers but every fourth. Rotary scaling is of the layers without a window only."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common_keys import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.olmo import OLMO2
from orchestrator.model.config_table import PassedOver, RotaryTable

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    config=replace(
        OLMO2.config,
        model_types=("olmo3",),
        defaults={**OLMO2.config.defaults, "sliding_window": 4096, "layer_types": None},
        nullable=OLMO2.config.nullable | {"sliding_window", "layer_types"},
        windows="but_fourth",
        rotary=RotaryTable(theta=500_000.0, local_theta=500_000.0, reads_type=False),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
            "sliding_window_pattern": PassedOver("layer_types decides", None),
        },
    ),
)
