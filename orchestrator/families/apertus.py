"""Apertus: heads with norms, and an MLP without a gate whose activation, xIELU, has numbers of its own in each layer."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, SOURCE, TARGET, UNGATED_MLP, final, norm, qk_norms
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.model.config_table import XIELU, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family, Part, Rule

_ACTIVATION = tuple(
    Rule(f"{TARGET}mlp.act.{name}", (Part(f"{SOURCE}mlp.act_fn.{name}", ("one",)),), dtype="F32")
    for name in ("alpha_p", "alpha_n", "beta", "eps")
)

APERTUS = Family(
    name="apertus",
    architectures=("ApertusForCausalLM",),
    rules=(
        *EMBEDDING,
        norm("input_layernorm", "attention_layernorm"),
        *ATTENTION,
        *qk_norms(),
        norm("post_layernorm", "feedforward_layernorm"),
        *UNGATED_MLP,
        *_ACTIVATION,
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("apertus",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": XIELU,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": False,
            "attention_bias": False,
        },
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        constants={"mlp_gated": False, "qk_layernorm": "head"},
        derived=ATTENTION_BIASES,
        activations={XIELU: XIELU},
        rotary=RotaryTable(
            theta=12000000.0,
            parameters={
                "rope_type": "llama3",
                "rope_theta": 12000000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
        passed_over={
            "mlp_bias": PassedOver("its MLP has no biases"),
            "post_norm": PassedOver("its norms come before attention and MLP"),
            "qk_norm": PassedOver("its heads always have norms", (None, True)),
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
        },
    ),
)
