"""gpt-oss: a sink per attention head, a window in every second layer, experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, SINKS, final
from orchestrator.families.common_experts import fused_experts
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, ONE_ACTIVATION
from orchestrator.model.config_table import ACTIVATIONS, ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_EXPERTS = fused_experts("mlp.router", "mlp.experts", transposed=True, interleaved=True)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, SINKS, PRE_NORMS[1], *_EXPERTS, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("gpt_oss",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "hidden_act": "silu",
        },
        nullable=frozenset({"sliding_window", "layer_types"}),
        constants={"attention_sinks": True},
        derived=ATTENTION_BIASES,
        activations=dict.fromkeys(ACTIVATIONS, "silu"),  # transformers does not read it
        windows="every_other",
        rotary=RotaryTable(theta=150_000.0, parameters=_YARN),
        experts=ExpertTable(
            "num_local_experts",
            "intermediate_size",
            alias="num_experts",
            constants={
                "scoring": "softmax_of_chosen",
                "router_bias": True,
                "expert_bias": True,
                "swiglu_limit": 7.0,
                "swiglu_alpha": 1.702,
                "swiglu_beta": 1.0,
            },
        ),
        passed_over={
            **NO_CAPS,
            **ONE_ACTIVATION,
            "use_sliding_window": PassedOver("sliding_window and layer_types decide", (None, True)),
            "max_window_layers": PassedOver("sliding_window and layer_types decide", None),
            "sliding_window_pattern": PassedOver("every other layer has the window", (None, 2)),
            "swiglu_limit": PassedOver("experts are clamped at 7", (None, 7.0)),
            "experts_per_token": PassedOver("num_experts_per_tok says the same", None),
            "initial_context_length": PassedOver("the rotary embedding holds the trained length", None),
            "norm_topk_prob": PassedOver("the softmax is over the chosen experts", (None, True)),
        },
    ),
)
