"""FlexOlmo: OLMo 2's attention and norms, with OLMoE's experts instead of the MLP."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import ATTENTION, EMBEDDING, FULL_QK_NORMS, IGNORED, final, norm
from orchestrator.families.common_experts import experts
from orchestrator.families.olmoe import OLMOE
from orchestrator.model.config_table import RotaryTable
from orchestrator.model.rules import Family

FLEX_OLMO = Family(
    name="flex_olmo",
    architectures=("FlexOlmoForCausalLM",),
    rules=(
        *EMBEDDING,
        *ATTENTION,
        *FULL_QK_NORMS,
        norm("post_layernorm", "post_attention_layernorm"),
        *experts("mlp.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj"),
        norm("post_feedforward_layernorm", "post_feedforward_layernorm"),
        *final(),
    ),
    ignored=IGNORED,
    config=replace(
        OLMOE.config,
        model_types=("flex_olmo",),
        defaults={**OLMOE.config.defaults, "rms_norm_eps": 1e-6, "num_experts": 7, "num_experts_per_tok": 5},
        constants={"norm_placement": "post", "qk_layernorm": "full"},
        rotary=RotaryTable(theta=500_000.0),
    ),
)
