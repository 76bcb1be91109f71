"""Rules that most families share. Names and layouts are those of TensorRT-LLM's checkpoints.

Caution: `mlp.fc` is Hugging Face's gate_proj, which passes through the activation, and `mlp.gate` is its up_proj. The `mlp.fc` of
an expert joins both, up first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.model.config_table import PassedOver
from orchestrator.model.rules import (
    COLUMN,
    EXPERT_COLUMN,
    EXPERT_ROW,
    HEADS,
    HEADS_IN,
    KV_HEADS,
    PREDICTS_FURTHER,
    ROW,
    VOCAB,
    Cut,
    Fusion,
    Ignored,
    Layers,
    Part,
    Rule,
    Where,
)

SOURCE = "model.layers.{layer}."
TARGET = "transformer.layers.{layer}."
_ATTENTION = SOURCE + "self_attn."
_MLP = SOURCE + "mlp."
_KV_B, _KV_B_SECTIONS = _ATTENTION + "kv_b_proj.weight", ("nope", "value")


def _embedding(cut: Cut | None, **when: object) -> Rule:
    part = Part("model.embed_tokens.weight", ("vocab", "hidden"), cut)
    return Rule("transformer.vocab_embedding.weight", (part,), Where.FIRST_STAGE, when)


def _mlp(target: str, part: Part, **when: object) -> Rule:
    return Rule(TARGET + "mlp." + target, (part,), when=when, layers=Layers.DENSE)


EMBEDDING = (
    _embedding(None, use_parallel_embedding=False),
    _embedding(VOCAB, use_parallel_embedding=True, embedding_sharding_dim=0),
    _embedding(ROW, use_parallel_embedding=True, embedding_sharding_dim=1),
)
"""Rules of the embedding: whole on every rank, or split by vocabulary or hidden size."""
QKV = Rule(
    TARGET + "attention.qkv.weight",
    (
        Part(_ATTENTION + "q_proj.weight", ("q", "hidden"), HEADS),
        Part(_ATTENTION + "k_proj.weight", ("kv", "hidden"), KV_HEADS),
        Part(_ATTENTION + "v_proj.weight", ("kv", "hidden"), KV_HEADS),
    ),
)
QKV_BIAS = Rule(
    TARGET + "attention.qkv.bias",
    (
        Part(_ATTENTION + "q_proj.bias", ("q",), HEADS),
        Part(_ATTENTION + "k_proj.bias", ("kv",), KV_HEADS),
        Part(_ATTENTION + "v_proj.bias", ("kv",), KV_HEADS),
    ),
    when={"attn_bias": True},
)
DENSE = Rule(TARGET + "attention.dense.weight", (Part(_ATTENTION + "o_proj.weight", ("hidden", "q"), HEADS_IN),))
DENSE_BIAS = Rule(TARGET + "attention.dense.bias", (Part(_ATTENTION + "o_proj.bias", ("hidden",)),), when={"attn_dense_bias": True})
ATTENTION = (QKV, QKV_BIAS, DENSE, DENSE_BIAS)
SINKS = Rule(TARGET + "attention.sinks", (Part(_ATTENTION + "sinks", ("heads",), HEADS),))
"""Rule of the heads' sinks."""

LATENT_ATTENTION = (
    Rule(
        TARGET + "attention.fused_a.weight",
        (
            Part(_ATTENTION + "q_a_proj.weight", ("q_lora", "hidden")),
            Part(_ATTENTION + "kv_a_proj_with_mqa.weight", ("latent", "hidden")),
        ),
        when={"has_q_lora": True},
    ),
    Rule(
        TARGET + "attention.fused_a.bias",
        (Part(_ATTENTION + "q_a_proj.bias", ("q_lora",)), Part(_ATTENTION + "kv_a_proj_with_mqa.bias", ("latent",))),
        when={"has_q_lora": True, "attn_bias": True},
    ),
    Rule(
        TARGET + "attention.fused_a.weight",
        (Part(_ATTENTION + "kv_a_proj_with_mqa.weight", ("latent", "hidden")),),
        when={"has_q_lora": False},
    ),
    Rule(
        TARGET + "attention.fused_a.bias",
        (Part(_ATTENTION + "kv_a_proj_with_mqa.bias", ("latent",)),),
        when={"has_q_lora": False, "attn_bias": True},
    ),
    Rule(
        TARGET + "attention.q_a_layernorm.weight",
        (Part(_ATTENTION + "q_a_layernorm.weight", ("q_lora",)),),
        when={"has_q_lora": True},
    ),
    Rule(TARGET + "attention.kv_a_layernorm.weight", (Part(_ATTENTION + "kv_a_layernorm.weight", ("kv_lora",)),)),
    Rule(
        TARGET + "attention.q_b_proj.weight",
        (Part(_ATTENTION + "q_b_proj.weight", ("q", "q_lora"), HEADS),),
        when={"has_q_lora": True},
    ),
    Rule(
        TARGET + "attention.q_b_proj.weight",
        (Part(_ATTENTION + "q_proj.weight", ("q", "hidden"), HEADS),),
        when={"has_q_lora": False},
    ),
    Rule(TARGET + "attention.k_b_proj.weight", (Part(_KV_B, ("nope", "kv_lora"), None, _KV_B_SECTIONS, 0),), per_head=True),
    Rule(TARGET + "attention.v_b_proj.weight", (Part(_KV_B, ("value", "kv_lora"), None, _KV_B_SECTIONS, 1),), per_head=True),
    Rule(TARGET + "attention.dense.weight", (Part(_ATTENTION + "o_proj.weight", ("hidden", "v"), HEADS_IN),)),
    DENSE_BIAS,
)
"""Rules of latent attention (MLA). Names are those of TensorRT-LLM's deepseek_v2, which has k_b_proj and v_b_proj in one tensor,
`kv_b_proj`, and a product of q_b_proj and k_b_proj besides."""

GATED_MLP = (
    _mlp("fc.weight", Part(_MLP + "gate_proj.weight", ("inter", "hidden"), COLUMN)),
    _mlp("fc.bias", Part(_MLP + "gate_proj.bias", ("inter",), COLUMN), mlp_bias=True),
    _mlp("gate.weight", Part(_MLP + "up_proj.weight", ("inter", "hidden"), COLUMN)),
    _mlp("gate.bias", Part(_MLP + "up_proj.bias", ("inter",), COLUMN), mlp_bias=True),
    _mlp("proj.weight", Part(_MLP + "down_proj.weight", ("hidden", "inter"), ROW)),
    _mlp("proj.bias", Part(_MLP + "down_proj.bias", ("hidden",)), mlp_bias=True),
)
"""Rules of the dense MLP, in the layers that have one."""
UNGATED_MLP = (
    _mlp("fc.weight", Part(_MLP + "up_proj.weight", ("inter", "hidden"), COLUMN)),
    _mlp("fc.bias", Part(_MLP + "up_proj.bias", ("inter",), COLUMN), mlp_bias=True),
    *GATED_MLP[4:],
)
"""The same of an MLP without a gate: `mlp.fc` is Hugging Face's up_proj."""


def renamed(rules: tuple[Rule, ...], names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Return the rules with parts of their source tensors' names replaced."""

    def own(source: str) -> str:
        for theirs, other in names.items():
            source = source.replace(theirs, other)
        return source

    return tuple(replace(rule, parts=tuple(replace(part, source=own(part.source)) for part in rule.parts)) for rule in rules)


def norm(target: str, source: str, size: str = "hidden") -> Rule:
    """Return the rule of a norm in every layer, whole on every rank."""
    return Rule(TARGET + target + ".weight", (Part(SOURCE + source + ".weight", (size,)),))


def offset(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules with norms stored as weight + 1: in the model's dtype for TensorRT-LLM's format, and exactly in float32.

    Rules of other tensors do not change.
    """
    found: list[Rule] = []
    for rule in rules:
        if not rule.target.endswith(("norm.weight", "ln_f.weight")):
            found.append(rule)
            continue
        added = replace(rule, parts=tuple(replace(part, add=1.0) for part in rule.parts))
        found += [added, replace(added, target=f"{rule.target}_float32", dtype="F32", when={**rule.when, "exact_norms": True})]
    return tuple(found)


def qk_norms() -> tuple[Rule, ...]:
    """Return the rules of the norms of queries and keys per head. All heads share a norm, so it is whole on every rank."""
    rules = (norm("attention.q_layernorm", "self_attn.q_norm", "head"), norm("attention.k_layernorm", "self_attn.k_norm", "head"))
    return tuple(replace(rule, when={"qk_layernorm": "head"}) for rule in rules)


def with_norm_biases(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules with a rule of the bias after that of each norm."""
    found: list[Rule] = []
    for rule in rules:
        found.append(rule)
        if rule.target.endswith(("norm.weight", "ln_f.weight")):
            parts = tuple(replace(part, source=part.source.removesuffix("weight") + "bias") for part in rule.parts)
            found.append(replace(rule, target=rule.target.removesuffix("weight") + "bias", parts=parts))
    return tuple(found)


FULL_QK_NORMS = (
    Rule(TARGET + "attention.q_layernorm.weight", (Part(SOURCE + "self_attn.q_norm.weight", ("q",), HEADS),)),
    Rule(TARGET + "attention.k_layernorm.weight", (Part(SOURCE + "self_attn.k_norm.weight", ("kv",), KV_HEADS),)),
)
"""Rules of the norms over all queries and over all keys, split by heads."""
PRE_NORMS = (norm("input_layernorm", "input_layernorm"), norm("post_layernorm", "post_attention_layernorm"))


def final() -> tuple[Rule, ...]:
    """Return the rules of the last norm and of the head, separate or tied to the embedding."""
    head = "lm_head.weight"
    return (
        Rule("transformer.ln_f.weight", (Part("model.norm.weight", ("hidden",)),), Where.LAST_STAGE),
        Rule("lm_head.bias", (Part("lm_head.bias", ("vocab",), VOCAB),), Where.LAST_STAGE, when={"head_bias": True}),
        Rule(head, (Part(head, ("vocab", "hidden"), VOCAB),), Where.LAST_STAGE, when={"tie_word_embeddings": False}),
        Rule(
            head,
            (Part("model.embed_tokens.weight", ("vocab", "hidden"), VOCAB),),
            Where.LAST_STAGE,
            when={"tie_word_embeddings": True},
        ),
    )


def _router(router: str) -> Rule:
    """Return the rule of a router's weight, which the rank files hold in float32."""
    return Rule(
        TARGET + "mlp.router.weight",
        (Part(SOURCE + router + ".weight", ("experts", "hidden")),),
        dtype="F32",
        layers=Layers.EXPERTS,
    )


def experts(
    router: str, expert: str, up: str, gate: str, down: str, bias: str = "", *, flat_bias: bool = False
) -> tuple[Rule, ...]:
    """Return the rules of the router, in float32, and of the stacked experts. The prefix `expert` holds {expert}.

    `bias`: name of the router's bias by which experts are chosen, in float32; empty: there is none. `flat_bias`: it is stored as
    [1, experts].
    """
    chosen_by = (bias,) if bias else ()
    return (
        _router(router),
        *(
            Rule(
                TARGET + "mlp.router.e_score_correction_bias",
                (Part(SOURCE + name, ("experts",), has_first_axis=flat_bias),),
                dtype="F32",
                layers=Layers.EXPERTS,
            )
            for name in chosen_by
        ),
        Rule(
            TARGET + "mlp.fc.weight",
            (
                Part(SOURCE + expert + up + ".weight", ("expert_inter", "hidden"), EXPERT_COLUMN),
                Part(SOURCE + expert + gate + ".weight", ("expert_inter", "hidden"), EXPERT_COLUMN),
            ),
            per_expert=True,
            layers=Layers.EXPERTS,
        ),
        Rule(
            TARGET + "mlp.proj.weight",
            (Part(SOURCE + expert + down + ".weight", ("hidden", "expert_inter"), EXPERT_ROW),),
            per_expert=True,
            layers=Layers.EXPERTS,
        ),
    )


def fused_experts(
    router: str,
    source: str,
    *,
    names: tuple[str, str] = ("gate_up_proj", "down_proj"),
    transposed: bool = False,
    interleaved: bool = False,
) -> tuple[Rule, ...]:
    """Return the rules of router and experts, with biases, of two tensors of all experts with these `names` under `source`.

    `transposed`: an expert is stored as [in, out]. `interleaved`: rows of gate and up alternate; else gate comes first.
    """
    fused, last = (f"{SOURCE}{source}.{name}" for name in names)
    gate, up = (Fusion(index, 2, interleaved, transposed) for index in (0, 1))
    # A vector has no second axis to be transposed with.
    gate_bias, up_bias = (Fusion(index, 2, interleaved) for index in (0, 1))
    weight = ("expert_inter", "hidden")
    stacked: dict[str, Any] = {"per_expert": True, "layers": Layers.EXPERTS}
    biased = {**stacked, "when": {"moe.expert_bias": True}}
    down = Part(last, ("hidden", "expert_inter"), EXPERT_ROW, fusion=Fusion(transposed=transposed))
    return (
        _router(router),
        Rule(
            TARGET + "mlp.router.bias",
            (Part(SOURCE + router + ".bias", ("experts",)),),
            when={"moe.router_bias": True},
            dtype="F32",
            layers=Layers.EXPERTS,
        ),
        Rule(
            TARGET + "mlp.fc.weight",
            (Part(fused, weight, EXPERT_COLUMN, fusion=up), Part(fused, weight, EXPERT_COLUMN, fusion=gate)),
            **stacked,
        ),
        Rule(
            TARGET + "mlp.fc.bias",
            (
                Part(fused + "_bias", weight[:1], EXPERT_COLUMN, fusion=up_bias),
                Part(fused + "_bias", weight[:1], EXPERT_COLUMN, fusion=gate_bias),
            ),
            **biased,
        ),
        Rule(TARGET + "mlp.proj.weight", (down,), **stacked),
        Rule(TARGET + "mlp.proj.bias", (Part(last + "_bias", ("hidden",), fusion=Fusion()),), **biased),
    )


def shared_expert(source: str) -> tuple[Rule, ...]:
    """Return the rules of the shared expert, whose linears lie under `source` within a layer. It is split like a dense MLP."""
    prefix = SOURCE + source + "."
    up, gate = (Part(f"{prefix}{name}_proj.weight", ("shared_inter", "hidden"), COLUMN) for name in ("up", "gate"))
    return _shared((up, gate), Part(f"{prefix}down_proj.weight", ("hidden", "shared_inter"), ROW))


def fused_shared_expert(fused: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of a shared expert whose gate and up are one tensor of a layer, gate first."""
    halves = ("shared_inter", "shared_inter")
    gate, up = (Part(SOURCE + fused, ("shared_inter", "hidden"), COLUMN, halves, index) for index in (0, 1))
    return _shared((up, gate), Part(SOURCE + down, ("hidden", "shared_inter"), ROW))


def _shared(fc: tuple[Part, Part], proj: Part) -> tuple[Rule, ...]:
    options: dict[str, Any] = {"when": {"moe.has_shared_expert": True}, "layers": Layers.EXPERTS}
    return (
        Rule(TARGET + "mlp.shared_expert.fc.weight", fc, **options),
        Rule(TARGET + "mlp.shared_expert.proj.weight", (proj,), **options),
    )


IGNORED = (
    Ignored("model.layers.*.self_attn.rotary_emb.inv_freq", "the rotary table is computed"),
    Ignored("lm_head.weight", "tied to the embedding", when={"tie_word_embeddings": True}),
)

PREDICTOR = (Ignored("model.layers.{last}.*", PREDICTS_FURTHER),)
"""The layer after the last of some models, for speculative decoding."""

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
