"""Gemma 1 to 3 (text) and VaultGemma: norms stored as weight + 1, the embedding scaled by sqrt(hidden) and tied to the head.

Gemma 2 caps attention scores and logits and has a window in every second layer; Gemma 3 has norms on queries and keys, a
window in five of six layers, and another rotary base in those. VaultGemma is Gemma 2 without the norms after attention and MLP.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, final, norm, offset, qk_norms
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS
from orchestrator.model.config_table import PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_LATER = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
"""Defaults of Gemma 2 and 3."""
_DERIVED = {
    "embedding_multiplier": ("sqrt", "hidden_size"),
    **ATTENTION_BIASES,
}
_SCALED = {
    **_DERIVED,
    "attention_scale": ("rsqrt", "query_pre_attn_scalar"),
    "final_logit_softcapping": ("is", "final_logit_softcapping"),
}
_HIDDEN_ACT = {"hidden_act": PassedOver("the activation is hidden_activation's", None)}
_EXACT_GELU = (
    "built is the exact GELU, as transformers reads it; Gemma was trained with its tanh approximation (gelu_pytorch_tanh), "
    "which the first config.json called gelu"
)
_NULLABLE = frozenset({"sliding_window", "layer_types", "final_logit_softcapping"})
_PRE = PRE_NORMS
_SANDWICH = (
    *_PRE,
    norm("pre_feedforward_layernorm", "pre_feedforward_layernorm"),
    norm("post_feedforward_layernorm", "post_feedforward_layernorm"),
)

GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    rules=offset((*EMBEDDING, *_PRE, *ATTENTION, *GATED_MLP, *final())),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("gemma",),
        defaults={**_DEFAULTS, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        constants={"exact_norms": True},
        derived=_DERIVED,
        passed_over={
            **NO_WINDOWS,
            **NO_CAPS,
            "hidden_activation": PassedOver("the activation is hidden_act's", (None, False, "gelu_pytorch_tanh")),
        },
        doubts={("hidden_act", "gelu"): _EXACT_GELU},
    ),
)
GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    rules=offset((*EMBEDDING, *_SANDWICH, *ATTENTION, *GATED_MLP, *final())),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("gemma2",),
        defaults={**_LATER, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        nullable=_NULLABLE | {"attn_logit_softcapping"},
        constants={"norm_placement": "sandwich", "exact_norms": True},
        derived={**_SCALED, "attn_logit_softcapping": ("is", "attn_logit_softcapping")},
        whole_heads=True,
        activation="hidden_activation",
        windows="every_other",
        passed_over={
            **_HIDDEN_ACT,
            "sliding_window_pattern": PassedOver("every other layer has the window", (None, 2)),
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
        },
    ),
)
GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    rules=offset((*EMBEDDING, *_SANDWICH, *ATTENTION, *qk_norms(), *GATED_MLP, *final())),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("gemma3_text",),
        defaults={
            **_LATER,
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        nullable=_NULLABLE,
        constants={"norm_placement": "sandwich", "qk_layernorm": "head", "exact_norms": True},
        derived=_SCALED,
        whole_heads=True,
        activation="hidden_activation",
        windows="pattern",
        rotary=RotaryTable(theta=1_000_000.0, local_theta=10_000.0, reads_type=False),
        passed_over={
            **_HIDDEN_ACT,
            "attn_logit_softcapping": PassedOver("scores are not capped, although the config class has the key"),
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
        },
    ),
)
VAULTGEMMA = Family(
    name="vaultgemma",
    architectures=("VaultGemmaForCausalLM",),
    rules=offset(
        (
            *EMBEDDING,
            norm("input_layernorm", "input_layernorm"),
            *ATTENTION,
            norm("post_layernorm", "pre_feedforward_layernorm"),
            *GATED_MLP,
            *final(),
        )
    ),
    ignored=IGNORED,
    config=replace(GEMMA2.config, model_types=("vaultgemma",), constants={"exact_norms": True}),
)
