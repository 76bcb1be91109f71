"""Qwen 2 (biases on queries, keys and values only), Qwen 3 (norms on queries and keys), and their mixtures of experts."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, SOURCE, TARGET, final, qk_norms
from orchestrator.families.common_experts import experts, shared_expert
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, ONE_ACTIVATION
from orchestrator.model.config_table import ExpertTable, PassedOver
from orchestrator.model.rules import ConfigTable, Family, Layers, Part, Rule

_DEFAULTS = {
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_LAYERS = {"max_window_layers": 28, "layer_types": None}
_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False}
_PASSED_OVER = {**NO_CAPS, **ONE_ACTIVATION, "sliding_window_pattern": PassedOver("max_window_layers or layer_types decide", None)}
_QKV_BIAS = {"attention_bias": PassedOver("queries, keys and values have biases, the output has none", None)}
_EXPERTS = experts("mlp.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj")
_SHARED_EXPERT = (
    *shared_expert("mlp.shared_expert"),
    Rule(
        TARGET + "mlp.shared_expert_gate.weight",
        (Part(SOURCE + "mlp.shared_expert_gate.weight", ("one", "hidden")),),
        layers=Layers.EXPERTS,
    ),
)

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("qwen2",),
        defaults={**_DEFAULTS, **_LAYERS},
        nullable=frozenset({"num_key_value_heads", "sliding_window", "layer_types"}),
        constants={"attn_bias": True, "attn_dense_bias": False},
        windows="from_max_window_layers",
        passed_over={**_PASSED_OVER, **_QKV_BIAS},
    ),
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *qk_norms(), PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("qwen3",),
        defaults={**_DEFAULTS, **_LAYERS, "head_dim": 128, "attention_bias": False},
        nullable=frozenset({"num_key_value_heads", "sliding_window", "layer_types"}),
        constants={"qk_layernorm": "head"},
        derived=ATTENTION_BIASES,
        windows="from_max_window_layers",
        passed_over=_PASSED_OVER,
    ),
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *GATED_MLP, *_EXPERTS, *_SHARED_EXPERT, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("qwen2_moe",),
        defaults={
            **_DEFAULTS,
            **_LAYERS,
            **_MOE,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        nullable=frozenset({"sliding_window", "layer_types", "mlp_only_layers"}),
        constants={"attn_dense_bias": False},
        derived={"attn_bias": ("is", "qkv_bias")},
        windows="even_below_max_window_layers",
        experts=ExpertTable(
            "num_experts",
            "moe_intermediate_size",
            normalized="norm_topk_prob",
            shared_size="shared_expert_intermediate_size",
            layers="sparse_step",
        ),
        passed_over={**_PASSED_OVER, "attention_bias": PassedOver("qkv_bias decides, and the output has none", None)},
    ),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *qk_norms(), PRE_NORMS[1], *GATED_MLP, *_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("qwen3_moe",),
        defaults={
            **_DEFAULTS,
            **_MOE,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "attention_bias": False,
        },
        nullable=frozenset({"sliding_window", "mlp_only_layers"}),
        constants={"qk_layernorm": "head"},
        derived=ATTENTION_BIASES,
        windows="all",
        experts=ExpertTable(
            "num_experts",
            "moe_intermediate_size",
            alias="num_local_experts",
            normalized="norm_topk_prob",
            layers="sparse_step",
        ),
        passed_over={
            **_PASSED_OVER,
            "max_window_layers": PassedOver("all layers have the window, or none", None),
            "layer_types": PassedOver("all layers have the window, or none"),
        },
    ),
)
