"""Phi-3.5-MoE: Mixtral's tensors, with biases of attention, norms and head, and a SparseMixer as router."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, final, with_norm_biases
from orchestrator.families.common_experts import experts
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, ONE_ACTIVATION
from orchestrator.families.mistral import ALWAYS_USED
from orchestrator.model.config_table import ExpertTable, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_EXPERTS = experts("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}.", "w3", "w1", "w2")

PHIMOE = Family(
    name="phimoe",
    # The second is that of the files on the hub, which came before transformers had the model.
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    rules=with_norm_biases((*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *_EXPERTS, *final())),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("phimoe",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "sliding_window": None,
            "attention_bias": False,
            "lm_head_bias": False,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
        },
        only={"num_experts_per_tok": (2,)},
        nullable=frozenset({"sliding_window"}),
        constants={"norm_kind": "layer", "norm_bias": True},
        derived={**ATTENTION_BIASES, "head_bias": ("is", "lm_head_bias")},
        windows="all",
        rotary=RotaryTable(theta=1_000_000.0, kinds=("default", "longrope"), mscales=True),
        experts=ExpertTable(
            "num_local_experts",
            "intermediate_size",
            jitter="router_jitter_noise",
            constants={"scoring": "sparse_mixer", "normalization_mode": 0},
        ),
        passed_over={**ALWAYS_USED, **NO_CAPS, **ONE_ACTIVATION},
    ),
)
