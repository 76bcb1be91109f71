"""Gemma 1, 2 and 3 (text): norms stored as weight + 1, the embedding scaled by sqrt(hidden) and tied to the head.

Gemma 2 caps attention scores and logits and has a window in every second layer; Gemma 3 has norms on queries and keys, a
window in five of six layers, and another rotary base in those.
"""

from __future__ import annotations

from orchestrator.core.rules import ConfigTable, Family
from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, final, norm, offset, qk_norms

_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
_SCALED = {"embedding_multiplier": ("sqrt", "hidden_size")}
_CAPPED = {
    **_SCALED,
    "attention_scale": ("rsqrt", "query_pre_attn_scalar"),
    "attn_logit_softcapping": ("is", "attn_logit_softcapping"),
    "final_logit_softcapping": ("is", "final_logit_softcapping"),
}
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
    config=ConfigTable(_DEFAULTS, constants={"exact_norms": True}, derived=_SCALED),
)
GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    rules=offset((*EMBEDDING, *_SANDWICH, *ATTENTION, *GATED_MLP, *final())),
    ignored=IGNORED,
    config=ConfigTable(
        {
            **_DEFAULTS,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        constants={"norm_placement": "sandwich", "exact_norms": True},
        derived=_CAPPED,
        window_pattern=2,
    ),
)
GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    rules=offset((*EMBEDDING, *_SANDWICH, *ATTENTION, *qk_norms(), *GATED_MLP, *final())),
    ignored=IGNORED,
    config=ConfigTable(
        {
            **_DEFAULTS,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        constants={"norm_placement": "sandwich", "qk_layernorm": "head", "exact_norms": True},
        derived=_CAPPED,
        window_pattern=6,
    ),
)
