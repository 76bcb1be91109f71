"""Gemma 4 (text): heads of two sizes, keys that serve as values in the layers without a window, experts beside the dense MLP.

Its small models (E2B, E4B), whose layers have inputs of their own and share keys and values, are refused.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import (
    DENSE,
    DENSE_BIAS,
    EMBEDDING,
    GATED_MLP,
    IGNORED,
    PRE_NORMS,
    QKV,
    QKV_BIAS,
    SOURCE,
    TARGET,
    final,
    norm,
    qk_norms,
)
from orchestrator.families.common_experts import fused_experts, shared_expert
from orchestrator.families.common_keys import ATTENTION_BIASES
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family, Layers, Part, Rule

_WITH_EXPERTS = {"moe.own_norms": True}


def _with_experts(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(replace(rule, when={**rule.when, **_WITH_EXPERTS}, layers=Layers.EXPERTS) for rule in rules)


def _router(target: str, source: str, size: str) -> Rule:
    """Return the rule of a factor of the router, which the rank files hold in float32."""
    return Rule(TARGET + "mlp.router." + target, (Part(SOURCE + "router." + source, (size,)),), dtype="F32")


_ATTENTION = tuple(
    replace(rule, parts=rule.parts[:parts], layers=layers)
    for rule in (QKV, QKV_BIAS)
    for parts, layers in ((3, Layers.VALUES), (2, Layers.NO_VALUES))
)
_EXPERTS = _with_experts(
    (
        *fused_experts("router.proj", "experts"),
        _router("scale", "scale", "hidden"),
        _router("per_expert_scale", "per_expert_scale", "experts"),
        *shared_expert("mlp"),
        *(
            norm(name, name)
            for name in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")
        ),
    )
)

GEMMA4 = Family(
    name="gemma4",
    architectures=("Gemma4ForCausalLM",),
    rules=(
        *EMBEDDING,
        *PRE_NORMS,
        norm("pre_feedforward_layernorm", "pre_feedforward_layernorm"),
        norm("post_feedforward_layernorm", "post_feedforward_layernorm"),
        Rule(TARGET + "layer_scalar", (Part(SOURCE + "layer_scalar", ("one",)),)),
        *_ATTENTION,
        DENSE,
        DENSE_BIAS,
        *qk_norms(),
        *(replace(rule, when={**rule.when, "moe": None}) for rule in GATED_MLP),
        *_EXPERTS,
        *final(),
    ),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("gemma4_text",),
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_global_key_value_heads": None,
            "attention_k_eq_v": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "sliding_window": 512,
            "layer_types": None,
            "final_logit_softcapping": None,
            "enable_moe_block": False,
            "num_experts": None,
            "top_k_experts": None,
            "moe_intermediate_size": None,
            "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
        },
        only={
            "hidden_size_per_layer_input": (0,),
            "num_kv_shared_layers": (0,),
            "use_bidirectional_attention": (None, "vision"),
        },
        nullable=frozenset(
            {
                "num_global_key_value_heads",
                "layer_types",
                "final_logit_softcapping",
                "num_experts",
                "top_k_experts",
                "moe_intermediate_size",
            }
        ),
        constants={
            "norm_placement": "sandwich",
            "qk_layernorm": "head",
            "value_norm": True,
            "layer_scalar": True,
            "attention_scale": 1.0,
        },
        derived={
            "embedding_multiplier": ("sqrt", "hidden_size"),
            **ATTENTION_BIASES,
            "final_logit_softcapping": ("is", "final_logit_softcapping"),
        },
        activation="hidden_activation",
        windows="but_sixth",
        global_heads=True,
        last_is_full=True,
        rotary=RotaryTable(
            local_theta=10_000.0,
            kinds=("default", "proportional"),
            by_kind=True,
            parameters={
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
        experts=ExpertTable(
            "num_experts",
            "moe_intermediate_size",
            switch="enable_moe_block",
            chosen="top_k_experts",
            shared_size="intermediate_size",
            constants={"own_norms": True, "shared_expert_gate": False},
        ),
        passed_over={
            "attn_logit_softcapping": PassedOver("scores are not capped"),
            "hidden_act": PassedOver("the activation is hidden_activation's", None),
            "use_bidirectional_attention": PassedOver("tokens of text see those before them", (None, "vision")),
            "vocab_size_per_layer_input": PassedOver("layers have no inputs of their own", None),
            "use_double_wide_mlp": PassedOver("no layers share keys and values", None),
            "use_sliding_window": PassedOver("layer_types decide", (None, True)),
            "max_window_layers": PassedOver("layer_types decide", None),
            "sliding_window_pattern": PassedOver("layer_types decide", None),
        },
    ),
)
