"""Llama and what shares its tensors: Mistral.

Names and layouts as in TensorRT-LLM's checkpoints. The naming trap: `mlp.fc` is Hugging Face's gate_proj (the one that
passes through the activation) and `mlp.gate` is its up_proj.
"""

from __future__ import annotations

from orchestrator.core.rules import COLUMN, HEADS, HEADS_IN, KV_HEADS, ROW, VOCAB, Family, Ignored, Part, Rule, Where

_SOURCE = "model.layers.{layer}."
_TARGET = "transformer.layers.{layer}."

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    rules=(
        Rule(
            "transformer.vocab_embedding.weight",
            (Part("model.embed_tokens.weight", ("vocab", "hidden")),),
            Where.FIRST_STAGE,
        ),
        Rule(_TARGET + "input_layernorm.weight", (Part(_SOURCE + "input_layernorm.weight", ("hidden",)),)),
        Rule(
            _TARGET + "attention.qkv.weight",
            (
                Part(_SOURCE + "self_attn.q_proj.weight", ("q", "hidden"), HEADS),
                Part(_SOURCE + "self_attn.k_proj.weight", ("kv", "hidden"), KV_HEADS),
                Part(_SOURCE + "self_attn.v_proj.weight", ("kv", "hidden"), KV_HEADS),
            ),
        ),
        Rule(
            _TARGET + "attention.qkv.bias",
            (
                Part(_SOURCE + "self_attn.q_proj.bias", ("q",), HEADS),
                Part(_SOURCE + "self_attn.k_proj.bias", ("kv",), KV_HEADS),
                Part(_SOURCE + "self_attn.v_proj.bias", ("kv",), KV_HEADS),
            ),
            when={"attn_bias": True},
        ),
        Rule(_TARGET + "attention.dense.weight", (Part(_SOURCE + "self_attn.o_proj.weight", ("hidden", "q"), HEADS_IN),)),
        Rule(
            _TARGET + "attention.dense.bias",
            (Part(_SOURCE + "self_attn.o_proj.bias", ("hidden",)),),
            when={"attn_bias": True},
        ),
        Rule(_TARGET + "post_layernorm.weight", (Part(_SOURCE + "post_attention_layernorm.weight", ("hidden",)),)),
        Rule(_TARGET + "mlp.fc.weight", (Part(_SOURCE + "mlp.gate_proj.weight", ("inter", "hidden"), COLUMN),)),
        Rule(_TARGET + "mlp.fc.bias", (Part(_SOURCE + "mlp.gate_proj.bias", ("inter",), COLUMN),), when={"mlp_bias": True}),
        Rule(_TARGET + "mlp.gate.weight", (Part(_SOURCE + "mlp.up_proj.weight", ("inter", "hidden"), COLUMN),)),
        Rule(_TARGET + "mlp.gate.bias", (Part(_SOURCE + "mlp.up_proj.bias", ("inter",), COLUMN),), when={"mlp_bias": True}),
        Rule(_TARGET + "mlp.proj.weight", (Part(_SOURCE + "mlp.down_proj.weight", ("hidden", "inter"), ROW),)),
        Rule(_TARGET + "mlp.proj.bias", (Part(_SOURCE + "mlp.down_proj.bias", ("hidden",)),), when={"mlp_bias": True}),
        Rule("transformer.ln_f.weight", (Part("model.norm.weight", ("hidden",)),), Where.LAST_STAGE),
        Rule(
            "lm_head.weight",
            (Part("lm_head.weight", ("vocab", "hidden"), VOCAB),),
            Where.LAST_STAGE,
            when={"tie_word_embeddings": False},
        ),
        Rule(
            "lm_head.weight",
            (Part("model.embed_tokens.weight", ("vocab", "hidden"), VOCAB),),
            Where.LAST_STAGE,
            when={"tie_word_embeddings": True},
        ),
    ),
    ignored=(
        Ignored("model.layers.*.self_attn.rotary_emb.inv_freq", "the rotary table is computed"),
        Ignored("lm_head.weight", "tied to the embedding", when={"tie_word_embeddings": True}),
    ),
    config_defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
)
