"""Keys of config.json that families share: their defaults, what they decide, and why some are passed over."""

from __future__ import annotations

from orchestrator.model.config_table import PassedOver

_WINDOW = "its layers have no window"
NO_WINDOWS = {
    "sliding_window": PassedOver(_WINDOW),
    "use_sliding_window": PassedOver(_WINDOW),
    "max_window_layers": PassedOver(_WINDOW, None),
    "layer_types": PassedOver(_WINDOW),
    "sliding_window_pattern": PassedOver(_WINDOW, None),
}
"""Window keys of families without windows: a warning where config.json sets one."""
NO_CAPS = {key: PassedOver("its scores are not capped") for key in ("attn_logit_softcapping", "final_logit_softcapping")}
ONE_ACTIVATION = {"hidden_activation": PassedOver("the activation is hidden_act's")}
"""Gemma's second name of the activation, in families that do not read it."""
JITTER = {"router_jitter_noise": PassedOver("training only", None)}
"""Key of a SparseMixer's threshold, in families whose routers are others."""

ATTENTION_BIASES = {"attn_bias": ("is", "attention_bias"), "attn_dense_bias": ("is", "attention_bias")}
"""Fields of families in which attention_bias decides over the biases of queries, keys, values and output."""
LATENT_DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_interleave": True,
}
"""Defaults of the keys that models with latent attention share."""
LATENT_DERIVED = {
    **ATTENTION_BIASES,
    "rotary_interleaved": ("is", "rope_interleave"),
}
LATENT_PASSED_OVER = {
    "head_dim": PassedOver("the sizes of a head are those of qk_nope_head_dim, qk_rope_head_dim and v_head_dim", None),
    "qk_head_dim": PassedOver("it is qk_nope_head_dim and qk_rope_head_dim together", None),
    "scoring_func": PassedOver("the family decides how the router scores experts", (None, "sigmoid", "softmax")),
    "topk_method": PassedOver("the family decides how the router chooses experts", (None, "noaux_tc")),
    "moe_layer_freq": PassedOver("all layers after the first dense ones have experts", (None, 1)),
    **{key: PassedOver("training only", None) for key in ("aux_loss_alpha", "seq_aux")},
    "ep_size": PassedOver("how the publisher split the model", None),
}
