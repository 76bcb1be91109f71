"""Multi-head latent attention (MLA, DeepSeek V2 and V3), absorbed: attention over latents, with one key/value head for all heads.

The cache holds one latent and one rotated key per token, which all heads share. The expansion of the latent to a head's key,
W_uk, is applied to the query instead, and that to a head's value, W_uv, to the result of attention:

    q . (W_uk c) = (W_uk^T q) . c          sum_i p_i (W_uv c_i) = W_uv (sum_i p_i c_i)

So keys are [latent, rotated key], and values are the same tensor, whose rotated part is cut off after attention: TensorRT wants
keys and values of one shape.
"""

from __future__ import annotations

from orchestrator.networks.attention import LayerInputs, merged, rotate, scaled_queries, score_scale, split_heads
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.kv_cache import update_latents
from orchestrator.networks.layers import linear, rms_norm
from orchestrator.networks.shape import RankShape

_EPSILON = 1e-6
"""Epsilon of the latents' norms, whatever the model's (transformers: the default of its norm)."""


def latent_attention(graph: GraphWriter, shape: RankShape, x: str, inputs: LayerInputs) -> str:
    """Add the latent attention of a layer. New latents and rotated keys are first scattered into the cache."""
    config, prefix = shape.config, f"transformer.layers.{inputs.layer}.attention"
    widths = [width for width in (config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim) if width]
    fused = linear(graph, shape, x, f"{prefix}.fused_a", (sum(widths), config.hidden_size), bias=config.attn_bias)
    parts = [f"{prefix}.{name}" for name in ("q_a", "kv_a", "k_rope")][-len(widths) :]
    graph.nodes("Split", [fused, graph.constant("latent_widths", widths)], parts, axis=-1)
    latent = rms_norm(
        graph, shape, parts[-2], f"{prefix}.kv_a_layernorm.weight", f"{prefix}.latent", config.kv_lora_rank, epsilon=_EPSILON
    )
    rotated = rotate(graph, shape, _one_head(graph, parts[-1]), inputs.rotary)
    new = graph.node("Concat", [_one_head(graph, latent), rotated], f"{prefix}.new", axis=-1)
    cached = update_latents(graph, shape, inputs.layer, new)
    queries = _queries(graph, shape, x, parts[0] if config.q_lora_rank else None, inputs, prefix)
    mixed = graph.node("Attention", [queries, cached, cached, inputs.mask], f"{prefix}.mixed", scale=score_scale(config))
    bounds = (("zero_1d", [0]), ("latent_size", [config.kv_lora_rank]), ("axis_3", [3]))
    latents = graph.node("Slice", [mixed, *(graph.constant(*bound) for bound in bounds)], f"{prefix}.mixed_latents")
    # [heads, size of a value, latent], the checkpoint's layout
    expand = graph.external(f"{prefix}.v_b_proj.weight", shape.dtype, [shape.num_heads, config.value_size, config.kv_lora_rank])
    transposed = graph.node("Transpose", [expand], f"{prefix}.v_b_proj.weight_t", perm=[0, 2, 1])
    return merged(graph, shape, graph.node("MatMul", [latents, transposed], f"{prefix}.context"), prefix)


def _one_head(graph: GraphWriter, x: str) -> str:
    """Reshape [batch, tokens, size] to [batch, 1, tokens, size]."""
    return graph.node("Unsqueeze", [x, graph.constant("axis_1", [1])], f"{x}.head")


def _queries(graph: GraphWriter, shape: RankShape, x: str, latent: str | None, inputs: LayerInputs, prefix: str) -> str:
    """Add the queries [batch, heads, tokens, latent + rotated part], from their own latent or from the hidden states `x`."""
    config = shape.config
    width = config.hidden_size
    if latent is not None:
        width = config.q_lora_rank
        x = rms_norm(graph, shape, latent, f"{prefix}.q_a_layernorm.weight", f"{prefix}.q_latent", width, epsilon=_EPSILON)
    flat = linear(graph, shape, x, f"{prefix}.q_b_proj", (shape.num_heads * config.head_size, width))
    heads = split_heads(graph, flat, shape.num_heads, config.head_size)
    plain, rope = f"{prefix}.q_nope", f"{prefix}.q_rope"
    sizes = graph.constant("query_widths", [config.qk_nope_head_dim, config.qk_rope_head_dim])
    graph.nodes("Split", [heads, sizes], [plain, rope], axis=-1)
    size = [shape.num_heads, config.qk_nope_head_dim, config.kv_lora_rank]
    absorb = graph.external(f"{prefix}.k_b_proj.weight", shape.dtype, size)
    absorbed = graph.node("MatMul", [plain, absorb], f"{prefix}.q_absorbed")
    queries = graph.node("Concat", [absorbed, rotate(graph, shape, rope, inputs.rotary)], f"{prefix}.queries", axis=-1)
    return scaled_queries(graph, queries, inputs)
