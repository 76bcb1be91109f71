"""GLM-4 without experts: half of a head rotated in neighbouring pairs, and gate and up in one source tensor.

The 0414 models (Glm4ForCausalLM) have norms after attention and MLP besides.
"""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import DENSE, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, QKV, QKV_BIAS, final, norm
from orchestrator.families.common_keys import NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.families.phi import FUSED_GATE_UP
from orchestrator.model.config_table import SWIGLU, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_BLOCKS = (*EMBEDDING, QKV, QKV_BIAS, DENSE, FUSED_GATE_UP, GATED_MLP[4], *final())

GLM = Family(
    name="glm",
    architectures=("GlmForCausalLM",),
    rules=(*_BLOCKS, *PRE_NORMS),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("glm",),
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1.5625e-07,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
        constants={"rotary_interleaved": True},
        derived={"attn_bias": ("is", "attention_bias")},
        activations={"silu": SWIGLU, "swish": SWIGLU},
        rotary=RotaryTable(partial=True, fraction=0.5),
        passed_over={**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION},
    ),
)
GLM4 = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    rules=(
        *_BLOCKS,
        norm("input_layernorm", "input_layernorm"),
        norm("post_layernorm", "post_self_attn_layernorm"),
        norm("pre_feedforward_layernorm", "post_attention_layernorm"),
        norm("post_feedforward_layernorm", "post_mlp_layernorm"),
    ),
    ignored=IGNORED,
    config=replace(GLM.config, model_types=("glm4",), constants={**GLM.config.constants, "norm_placement": "sandwich"}),
)
