"""Ernie 4.5 and its mixtures: rotary embedding on pairs of neighbours; a softmax router with a selection bias, shared experts."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, DENSE, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, QKV, final
from orchestrator.families.common_experts import experts, shared_expert
from orchestrator.families.common_keys import NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import PREDICTS_FURTHER, ConfigTable, Family, Ignored

_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
_ROTARY = RotaryTable(theta=500_000.0)
_PASSED_OVER = {**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION}
_TRAINING = PassedOver("it matters in training only", None)
_EXPERTS = (
    *experts(
        "mlp.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj", bias="mlp.moe_statics.e_score_correction_bias",
        flat_bias=True,
    ),
    *shared_expert("mlp.shared_experts"),
)  # fmt: skip

ERNIE = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("ernie4_5",),
        defaults={**_DEFAULTS, "num_key_value_heads": 2, "head_dim": 128, "use_bias": False},
        nullable=frozenset({"num_key_value_heads", "head_dim", "use_bias"}),
        constants={"rotary_interleaved": True},
        derived=dict.fromkeys(("attn_bias", "attn_dense_bias", "mlp_bias"), ("is", "use_bias")),
        rotary=_ROTARY,
        passed_over=_PASSED_OVER,
    ),
)
ERNIE_MOE = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], QKV, DENSE, PRE_NORMS[1], *GATED_MLP, *_EXPERTS, *final()),
    ignored=(*IGNORED, Ignored("model.mtp_*", PREDICTS_FURTHER)),
    config=ConfigTable(
        model_types=("ernie4_5_moe",),
        defaults={
            **_DEFAULTS,
            "num_key_value_heads": 4,
            "head_dim": None,
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
        },
        constants={"rotary_interleaved": True},
        rotary=_ROTARY,
        experts=ExpertTable(
            "moe_num_experts",
            "moe_intermediate_size",
            alias="num_experts",
            chosen="moe_k",
            shared_count="moe_num_shared_experts",
            layers="between",
            sum_minimum="moe_norm_min",
            constants={"selection_bias": True, "shared_expert_gate": False},
        ),
        passed_over={
            **_PASSED_OVER,
            "moe_capacity": _TRAINING,
            "moe_gate": _TRAINING,
            "moe_use_aux_free": _TRAINING,
            "num_nextn_predict_layers": PassedOver("layers that predict further tokens are not built", None),
        },
    ),
)
