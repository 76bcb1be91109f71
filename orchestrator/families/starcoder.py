"""StarCoder2: LayerNorms, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from orchestrator.families.common import ATTENTION, EMBEDDING, IGNORED, PRE_NORMS, SOURCE, TARGET, final, with_norm_biases
from orchestrator.families.common_keys import NO_CAPS, ONE_ACTIVATION
from orchestrator.families.mistral import ALWAYS_USED
from orchestrator.model.config_table import PassedOver
from orchestrator.model.rules import COLUMN, ROW, ConfigTable, Family, Part, Rule

_FC, _PROJ = SOURCE + "mlp.c_fc.", SOURCE + "mlp.c_proj."
_MLP = (
    Rule(TARGET + "mlp.fc.weight", (Part(_FC + "weight", ("inter", "hidden"), COLUMN),)),
    Rule(TARGET + "mlp.fc.bias", (Part(_FC + "bias", ("inter",), COLUMN),), when={"mlp_bias": True}),
    Rule(TARGET + "mlp.proj.weight", (Part(_PROJ + "weight", ("hidden", "inter"), ROW),)),
    Rule(TARGET + "mlp.proj.bias", (Part(_PROJ + "bias", ("hidden",)),), when={"mlp_bias": True}),
)

STARCODER2 = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    rules=with_norm_biases((*EMBEDDING, PRE_NORMS[0], *ATTENTION, PRE_NORMS[1], *_MLP, *final())),
    ignored=IGNORED,
    config=ConfigTable(
        model_types=("starcoder2",),
        defaults={
            "num_key_value_heads": 2,
            "head_dim": None,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "use_bias": True,
            "sliding_window": None,
        },
        nullable=frozenset({"sliding_window", "head_dim"}),
        constants={"norm_kind": "layer", "norm_bias": True, "mlp_gated": False},
        derived={"attn_bias": ("is", "use_bias"), "attn_dense_bias": ("is", "use_bias"), "mlp_bias": ("is", "use_bias")},
        epsilon="norm_epsilon",
        windows="all",
        passed_over={
            **ALWAYS_USED,
            **NO_CAPS,
            **ONE_ACTIVATION,
            "layer_norm_epsilon": PassedOver("norm_epsilon is read", None),
            "norm_type": PassedOver("its norms are LayerNorms", (None, "layer_norm")),
            "mlp_type": PassedOver("its MLP has no gate", (None, "default")),
            "attention_softmax_in_fp32": PassedOver("softmax is in float32", (None, True)),
            "scale_attention_softmax_in_fp32": PassedOver("softmax is in float32", (None, True)),
            "scale_attn_weights": PassedOver("scores are scaled", (None, True)),
        },
    ),
)
