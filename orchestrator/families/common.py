"""Rules that most families share. Names and layouts are those of TensorRT-LLM's checkpoints.

Caution: `mlp.fc` is Hugging Face's gate_proj, which passes through the activation, and `mlp.gate` is its up_proj. The `mlp.fc` of
an expert joins both, up first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.model.rules import (
    COLUMN,
    HEADS,
    HEADS_IN,
    KV_HEADS,
    PREDICTS_FURTHER,
    ROW,
    VOCAB,
    Cut,
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


IGNORED = (
    Ignored("model.layers.*.self_attn.rotary_emb.inv_freq", "the rotary table is computed"),
    Ignored("lm_head.weight", "tied to the embedding", when={"tie_word_embeddings": True}),
)

PREDICTOR = (Ignored("model.layers.{last}.*", PREDICTS_FURTHER),)
"""The layer after the last of some models, for speculative decoding."""
