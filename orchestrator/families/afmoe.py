"""AFMoE (Arcee's Trinity): gated attention, rotary embedding in the layers with a window only, a sigmoid router, shared experts."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, SOURCE, TARGET, final, norm, qk_norms
from orchestrator.families.common_experts import experts, shared_expert
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, ONE_ACTIVATION
from orchestrator.families.glm import SIGMOID_TABLE
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import HEADS, ConfigTable, Family, Part, Rule

AFMOE = Family(
    name="afmoe",
    architectures=("AfmoeForCausalLM",),
    rules=(
        *EMBEDDING,
        *PRE_NORMS,
        norm("pre_feedforward_layernorm", "pre_mlp_layernorm"),
        norm("post_feedforward_layernorm", "post_mlp_layernorm"),
        *ATTENTION,
        Rule(TARGET + "attention.gate.weight", (Part(SOURCE + "self_attn.gate_proj.weight", ("q", "hidden"), HEADS),)),
        *qk_norms(),
        *GATED_MLP,
        *experts("mlp.router.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj", bias="mlp.expert_bias"),
        *shared_expert("mlp.shared_experts"),
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("afmoe",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 16384,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "moe_intermediate_size": 1408,
            "num_dense_layers": 1,
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "num_shared_experts": 2,
            "route_scale": 1.0,
            "global_attn_every_n_layers": 4,
            "sliding_window": 1024,
            "layer_types": None,
            "mup_enabled": False,
        },
        nullable=frozenset({"num_key_value_heads", "layer_types", "mup_enabled"}),
        constants={"norm_placement": "sandwich", "qk_layernorm": "head", "attention_gate": True},
        derived=ATTENTION_BIASES,
        embedding_switch="mup_enabled",
        windows="but_every_nth",
        rotary=RotaryTable(only_windows=True),
        experts=replace(
            SIGMOID_TABLE,
            count="num_experts",
            alias=None,
            normalized=None,
            shared_count="num_shared_experts",
            first="num_dense_layers",
            groups=None,
            routed_scale="route_scale",
        ),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            "use_sliding_window": PassedOver("layer_types decide", (None, True)),
            **{key: PassedOver("layer_types decide", None) for key in ("max_window_layers", "sliding_window_pattern")},
            "score_func": PassedOver("scores are sigmoids", (None, "sigmoid")),
            "route_norm": PassedOver("the chosen weights always sum to one", (None, True)),
            "load_balance_coeff": PassedOver("it matters in training only", None),
            **{key: PassedOver("experts are not grouped", (None, 1)) for key in ("n_group", "topk_group")},
            **{key: PassedOver("experts are not grouped", (None, 1)) for key in ("num_expert_groups", "num_limited_groups")},
            "use_grouped_mm": PassedOver("how transformers computes experts", None),
        },
    ),
)
