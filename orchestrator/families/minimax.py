"""MiniMax M2: norms over all queries and all keys, rotary embedding on a part of the head, a sigmoid router in every layer."""

from __future__ import annotations

from orchestrator.families.common import DENSE, EMBEDDING, FULL_QK_NORMS, IGNORED, PRE_NORMS, PREDICTOR, QKV, final
from orchestrator.families.common_experts import experts
from orchestrator.families.common_keys import JITTER, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_FURTHER = PassedOver("modules that predict further tokens are not built", None)
_BLOCK = "block_sparse_moe."
_EXPERTS = experts(_BLOCK + "gate", _BLOCK + "experts.{expert}.", "w3", "w1", "w2", bias=_BLOCK + "e_score_correction_bias")

MINIMAX_M2 = Family(
    name="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], QKV, DENSE, *FULL_QK_NORMS, PRE_NORMS[1], *_EXPERTS, *final()),
    ignored=(*IGNORED, *PREDICTOR),
    config=ConfigTable(
        model_types=("minimax_m2",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 196608,
            "tie_word_embeddings": False,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "rotary_dim": None,
        },
        constants={"qk_layernorm": "full"},
        rotary=RotaryTable(theta=5_000_000.0, partial=True, dim="rotary_dim"),
        experts=ExpertTable(
            "num_local_experts",
            "intermediate_size",
            alias="num_experts",
            constants={"scoring": "sigmoid", "selection_bias": True},
        ),
        passed_over={
            **NO_WINDOWS,
            **NO_CAPS,
            **JITTER,
            **ONE_ACTIVATION,
            "norm_topk_prob": PassedOver("the chosen weights always sum to one", (None, True)),
            "use_qk_norm": PassedOver("queries and keys are always normed", (None, True)),
            "qk_norm_type": PassedOver("the norms are over all heads", (None, "per_layer")),
            "use_routing_bias": PassedOver("the router always has one", (None, True)),
            "scoring_func": PassedOver("scores are sigmoids", (None, "sigmoid")),
            "attn_type_list": PassedOver("every layer has full attention", None),
            "shared_intermediate_size": PassedOver("there is no shared expert", (None, 0)),
            "use_mtp": _FURTHER,
            "num_mtp_modules": _FURTHER,
            "mtp_transformer_layers": _FURTHER,
        },
    ),
)
