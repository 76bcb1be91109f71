"""Mixtral: Mistral's attention, experts instead of the MLP."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, final
from orchestrator.families.common_experts import experts
from orchestrator.families.common_keys import JITTER, NO_CAPS, ONE_ACTIVATION
from orchestrator.families.mistral import ALWAYS_USED
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_EXPERTS = experts("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}.", "w3", "w1", "w2")

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("mixtral",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        nullable=frozenset({"head_dim", "sliding_window"}),
        windows="all",
        rotary=RotaryTable(theta=1_000_000.0),
        experts=ExpertTable("num_local_experts", "intermediate_size", alias="num_experts"),
        passed_over={
            **ALWAYS_USED,
            **NO_CAPS,
            **JITTER,
            **ONE_ACTIVATION,
            "norm_topk_prob": PassedOver("the chosen probabilities always sum to one", (None, True)),
            "moe_intermediate_size": PassedOver("experts have intermediate_size"),
        },
    ),
)
