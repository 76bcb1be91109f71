"""Arcee (AFM): Llama without the MLP's gate, which is activated by the square of a ReLU."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, UNGATED_MLP, final
from orchestrator.families.llama import LLAMA
from orchestrator.model.config_table import ACTIVATIONS
from orchestrator.model.rules import ConfigTable, Family

ARCEE = Family(
    name="arcee",
    architectures=("ArceeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *UNGATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("arcee",),
        defaults={**LLAMA.config.defaults, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        nullable=frozenset({"num_key_value_heads", "head_dim"}),
        constants={"mlp_gated": False},
        derived=LLAMA.config.derived,
        whole_heads=True,
        activations={name: name for name in (*ACTIVATIONS, "relu2")},
        passed_over=LLAMA.config.passed_over,
    ),
)
