"""Granite: Llama's tensors, with multipliers on embedding, attention, residuals and logits; and its mixtures."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, final
from orchestrator.families.common_experts import fused_experts, fused_shared_expert
from orchestrator.families.llama import LLAMA, LLAMA_BIASES
from orchestrator.model.config_table import ExpertTable
from orchestrator.model.rules import ConfigTable, Family

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    rules=LLAMA.rules,
    ignored=LLAMA.ignored,
    config=ConfigTable(
        model_types=("granite",),
        defaults={
            **LLAMA.config.defaults,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        nullable=frozenset({"num_key_value_heads"}),
        derived={
            **LLAMA_BIASES,
            "embedding_multiplier": ("is", "embedding_multiplier"),
            "attention_scale": ("is", "attention_multiplier"),
            "residual_multiplier": ("is", "residual_multiplier"),
            "logits_scaling": ("is", "logits_scaling"),
        },
        passed_over=LLAMA.config.passed_over,
    ),
)
_BLOCK = "block_sparse_moe"
_EXPERTS = fused_experts(f"{_BLOCK}.router.layer", _BLOCK, names=("input_linear.weight", "output_linear.weight"))
_SHARED = fused_shared_expert("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")
_TABLE = ExpertTable("num_local_experts", "intermediate_size", constants={"scoring": "softmax_of_chosen"})

GRANITE_MOE = Family(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *_EXPERTS, *final()),
    ignored=IGNORED,
    config=replace(
        GRANITE.config,
        model_types=("granitemoe",),
        defaults={
            **{key: value for key, value in GRANITE.config.defaults.items() if key != "mlp_bias"},
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        derived={field: derived for field, derived in GRANITE.config.derived.items() if field != "mlp_bias"},
        experts=_TABLE,
    ),
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    name="granitemoeshared",
    architectures=("GraniteMoeSharedForCausalLM",),
    rules=(*GRANITE_MOE.rules, *_SHARED),
    config=replace(
        GRANITE_MOE.config,
        model_types=("granitemoeshared",),
        defaults={**GRANITE_MOE.config.defaults, "shared_intermediate_size": 0},
        experts=replace(
            _TABLE, shared_size="shared_intermediate_size", constants={**_TABLE.constants, "shared_expert_gate": False}
        ),
    ),
)
