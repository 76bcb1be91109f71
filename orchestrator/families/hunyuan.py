"""Tencent's Hunyuan V1, whose heads are normed after they are rotated, and Hy3, a mixture in the manner of DeepSeek V3."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.families.common import ATTENTION, EMBEDDING, GATED_MLP, IGNORED, PRE_NORMS, PREDICTOR, final, qk_norms, renamed
from orchestrator.families.common_experts import experts, shared_expert
from orchestrator.families.common_keys import ATTENTION_BIASES, NO_CAPS, NO_WINDOWS, ONE_ACTIVATION
from orchestrator.families.glm import SIGMOID_TABLE
from orchestrator.model.config_table import ExpertTable, PassedOver, RotaryTable
from orchestrator.model.rules import ConfigTable, Family

_QK_NORMS = renamed(qk_norms(), {"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"})
_OTHER_CODE = "a key of the publisher's own code"
_OF_OTHER_CODE = {
    "attention_head_dim": PassedOver("head_dim says the same", None),
    "use_qk_norm": PassedOver("queries and keys are always normed", (None, True)),
    "use_rotary_pos_emb": PassedOver("queries and keys are always rotated", (None, True)),
    "norm_type": PassedOver("norms are RMSNorms", (None, "rms")),
    **{key: PassedOver("layers do not share keys and values") for key in ("use_cla", "use_mla")},
    **{key: PassedOver(_OTHER_CODE, None) for key in ("cla_share_factor", "position_embedding_xdrope", "xdrope_section")},
    **{
        key: PassedOver(_OTHER_CODE, None)
        for key in (
            "add_classification_head", "class_num", "dense_list", "eod_token_id", "im_end_id", "im_newline_id", "im_start_id",
            "mask_init_id", "num_media_embeds", "org_vocab_size", "pad_id", "pool_type", "skip_cls_token", "text_end_id",
            "text_start_id", "video_end_id", "video_start_id",
        )
    },
}  # fmt: skip
HUNYUAN_DENSE = Family(
    name="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    rules=(*EMBEDDING, PRE_NORMS[0], *ATTENTION, *_QK_NORMS, PRE_NORMS[1], *GATED_MLP, *final()),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("hunyuan_v1_dense",),
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "attention_bias": False,
        },
        required=frozenset({"head_dim"}),
        nullable=frozenset({"num_key_value_heads"}),
        constants={"qk_layernorm": "head", "qk_norm_after_rotary": True},
        derived=ATTENTION_BIASES,
        rotary=RotaryTable(alpha=True),
        passed_over={**NO_WINDOWS, **NO_CAPS, **ONE_ACTIVATION, **_OF_OTHER_CODE},
    ),
)
HUNYUAN_MOE = Family(
    name="hunyuan_v1_moe",
    architectures=("HunYuanMoEV1ForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        *ATTENTION,
        *_QK_NORMS,
        PRE_NORMS[1],
        *experts("mlp.gate.wg", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj"),
        *shared_expert("mlp.shared_mlp"),
        *final(),
    ),
    ignored=IGNORED,
    config=replace(
        HUNYUAN_DENSE.config,
        model_types=("hunyuan_v1_moe",),
        defaults={**HUNYUAN_DENSE.config.defaults, "num_experts": 1, "moe_topk": 1},
        experts=ExpertTable(
            "num_experts",
            "intermediate_size",
            alias="num_local_experts",
            chosen="moe_topk",
            listed_choice=True,
            shared_size="intermediate_size",
            constants={"shared_expert_gate": False},
        ),
        passed_over={
            **HUNYUAN_DENSE.config.passed_over,
            "use_mixed_mlp_moe": PassedOver("there is always a shared expert", (None, True)),
            "norm_topk_prob": PassedOver("the chosen weights always sum to one", (None, True)),
            "routed_scaling_factor": PassedOver("weights are not scaled", (None, False, 1.0)),
            "moe_layer_num_skipped": PassedOver("every layer has experts", (None, 0)),
            "moe_intermediate_size": PassedOver("intermediate_size is an expert's", None),
            "num_shared_expert": PassedOver("there is one shared expert", None),
            "group_limited_greedy": PassedOver("experts are not grouped"),
            **{key: PassedOver(_OTHER_CODE, None) for key in ("moe_drop_tokens", "moe_random_routing_dropped_token")},
        },
    ),
)
HY3 = Family(
    name="hy_v3",
    architectures=("HYV3ForCausalLM",),
    rules=(
        *EMBEDDING,
        PRE_NORMS[0],
        *ATTENTION,
        *qk_norms(),
        PRE_NORMS[1],
        *GATED_MLP,
        *experts("mlp.router.gate", "mlp.experts.{expert}.", "up_proj", "gate_proj", "down_proj", bias="mlp.expert_bias"),
        *shared_expert("mlp.shared_mlp"),
        *final(),
    ),
    ignored=(*IGNORED, *PREDICTOR),
    config=ConfigTable(
        model_types=("hy_v3",),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "moe_intermediate_size": 1536,
            "num_experts": 192,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
            "router_scaling_factor": 2.826,
            "mlp_layer_types": None,
        },
        nullable=frozenset({"mlp_layer_types"}),
        constants={"qk_layernorm": "head"},
        derived=ATTENTION_BIASES,
        rotary=RotaryTable(theta=11_158_840.0),
        experts=replace(
            SIGMOID_TABLE,
            count="num_experts",
            normalized=None,
            shared_count="num_shared_experts",
            layers="listed",
            groups=None,
            routed_scale="router_scaling_factor",
        ),
        passed_over={
            **NO_WINDOWS,
            **NO_CAPS,
            **ONE_ACTIVATION,
            "enable_moe_fp32_combine": PassedOver("the dtype in which the shared expert is added", None),
            "first_k_dense_replace": PassedOver("mlp_layer_types decides; without it, all but the first have experts", (None, 1)),
            "num_nextn_predict_layers": PassedOver("layers that predict further tokens are not built", None),
            "moe_router_use_sigmoid": PassedOver("scores are sigmoids", (None, True)),
            "moe_router_enable_expert_bias": PassedOver("experts are chosen by a bias", (None, True)),
            "route_norm": PassedOver("the chosen weights always sum to one", (None, True)),
            "qk_norm": PassedOver("queries and keys are always normed", (None, True)),
            "expert_hidden_dim": PassedOver("moe_intermediate_size says the same", None),
            "enable_lm_head_fp32": PassedOver("the dtype of the head", None),
            "enable_attention_fp32_softmax": PassedOver("the dtype of the softmax", None),
        },
    ),
)
