"""Nemotron and Jais 2: LayerNorms with biases, and an MLP without a gate, activated by the square of a ReLU.

Nemotron's norms are stored as weight - 1, and half of a head is rotated.
"""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, UNGATED_MLP, final, offset, with_norm_biases
from orchestrator.families.common_keys import NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.families.llama import LLAMA_BIASES
from orchestrator.model.config_table import ACTIVATIONS, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_RULES = with_norm_biases((*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *UNGATED_MLP, *final()))
_KNOWN = {name: name for name in (*ACTIVATIONS, "relu2")}
_PASSED_OVER = {**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION}

NEMOTRON = Family(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    rules=offset(_RULES),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("nemotron",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "relu2",
            "norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        },
        required=frozenset({"num_key_value_heads"}),
        nullable=frozenset({"head_dim"}),
        constants={"norm_kind": "layer", "norm_bias": True, "mlp_gated": False, "exact_norms": True},
        derived=LLAMA_BIASES,
        epsilon="norm_eps",
        activations=_KNOWN,
        rotary=RotaryTable(partial=True, fraction=0.5),
        passed_over=_PASSED_OVER,
    ),
)
JAIS2 = Family(
    name="jais2",
    architectures=("Jais2ForCausalLM",),
    rules=_RULES,
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("jais2",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "relu2",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        constants={"norm_kind": "layer", "norm_bias": True, "mlp_gated": False},
        derived=LLAMA_BIASES,
        epsilon="layer_norm_eps",
        whole_heads=True,
        activations=_KNOWN,
        passed_over=_PASSED_OVER,
    ),
)
