"""Qwen 2 (biases on queries, keys and values only), Qwen 3 (norms on queries and keys), and their mixtures of experts."""

from __future__ import annotations

from orchestrator.core.rules import COLUMN, ROW, ConfigTable, Family, Part, Rule
from orchestrator.families.common import (
    ATTENTION,
    EMBEDDING,
    GATED_MLP,
    IGNORED,
    PRE_NORMS,
    SOURCE,
    TARGET,
    experts,
    final,
    qk_norms,
)

_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "use_sliding_window": False}
_EXPERTS = experts("mlp.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj")
_SHARED = SOURCE + "mlp.shared_expert."
_SHARED_EXPERT = (
    Rule(
        TARGET + "mlp.shared_expert.fc.weight",
        (
            Part(_SHARED + "up_proj.weight", ("shared_inter", "hidden"), COLUMN),
            Part(_SHARED + "gate_proj.weight", ("shared_inter", "hidden"), COLUMN),
        ),
    ),
    Rule(TARGET + "mlp.shared_expert.proj.weight", (Part(_SHARED + "down_proj.weight", ("hidden", "shared_inter"), ROW),)),
    Rule(TARGET + "mlp.shared_expert_gate.weight", (Part(SOURCE + "mlp.shared_expert_gate.weight", ("one", "hidden")),)),
)

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(_DEFAULTS, constants={"attn_bias": True, "attn_dense_bias": False}),
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *qk_norms(), PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable({**_DEFAULTS, "head_dim": 128}, constants={"qk_layernorm": "head"}),
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *_EXPERTS, *_SHARED_EXPERT, *final()),
    ignored=IGNORED,
    config=ConfigTable({**_DEFAULTS, "norm_topk_prob": False}, constants={"attn_bias": True, "attn_dense_bias": False}),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *qk_norms(), PRE_NORMS[1], *_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable({**_DEFAULTS, "norm_topk_prob": False, "head_dim": 128}, constants={"qk_layernorm": "head"}),
)
