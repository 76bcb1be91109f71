"""dots.llm1 and Solar Open: mixtures in the manner of GLM-4.5."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import ATTENTION, DENSE, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, QKV, QKV_BIAS, final, qk_norms
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.families.glm import SIGMOID_EXPERTS, SIGMOID_TABLE
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_TRAINING = PassedOver("it matters in training only", None)
_SIZES = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "hidden_act": "silu", "tie_word_embeddings": False}
_ROUTER = {
    "moe_layer_freq": PassedOver("all layers after the first dense ones have experts", (None, 1)),
    "scoring_func": PassedOver("scores are sigmoids", (None, "sigmoid", "noaux_tc")),
    "topk_method": PassedOver("experts are chosen by groups and bias", (None, "noaux_tc")),
    "seq_aux": _TRAINING,
    "aux_loss_alpha": _TRAINING,
    "ep_size": _TRAINING,
}

DOTS1 = Family(
    name="dots1",
    architectures=("Dots1ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *qk_norms(), PRE_NORMS[1], *GATED_MLP, *SIGMOID_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("dots1",),
        defaults={
            **_SIZES,
            "num_key_value_heads": 32,
            "head_dim": None,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "moe_intermediate_size": 1408,
            "n_routed_experts": None,
            "n_shared_experts": None,
            "num_experts_per_tok": None,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "sliding_window": 4096,
            "max_window_layers": 62,
            "layer_types": None,
        },
        nullable=frozenset({"num_key_value_heads", "sliding_window", "layer_types", "norm_topk_prob"}),
        constants={"qk_layernorm": "head"},
        derived=ATTENTION_BIASES,
        windows="from_max_window_layers",
        experts=SIGMOID_TABLE,
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            **_ROUTER,
            "use_sliding_window": PassedOver("sliding_window and max_window_layers decide", (None, True)),
            "sliding_window_pattern": PassedOver("max_window_layers or layer_types decide", None),
        },
    ),
)
SOLAR_OPEN = Family(
    name="solar_open",
    architectures=("SolarOpenForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], QKV, QKV_BIAS, DENSE, PRE_NORMS[1], *SIGMOID_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("solar_open",),
        defaults={
            **_SIZES,
            "intermediate_size": 10240,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "moe_intermediate_size": 1280,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        constants={"attn_dense_bias": False},
        derived={"attn_bias": ("is", "attention_bias")},
        rotary=RotaryTable(theta=1_000_000.0, whole=True),
        experts=replace(SIGMOID_TABLE, layers="all"),
        passed_over={
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
            **_ROUTER,
            "first_k_dense_replace": PassedOver("every layer has experts", (None, 0)),
            "use_qk_norm": PassedOver("queries and keys are not normed"),
        },
    ),
)
