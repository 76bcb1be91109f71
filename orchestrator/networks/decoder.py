"""The decoder's graph for one rank, which serves both prefill and decode.

Inputs, with B sequences, S tokens each, C cache slots:

    input_ids      int64 [B, S]            first stage; hidden_states [B, S, hidden] on the others
    position_ids   int64 [B, S]            position of each token in its sequence, which is its cache slot; 0 for padding
    write_indices  int64 [B]               first slot to write; position_ids[:, 0]
    logit_indices  int64 [B, N]            last stage: indices (0..S-1) of the tokens whose logits are returned
    past_key_values.L.key / .value         [B, kv_heads, C, head_size], layer L counts within the stage

With latent attention (MLA), a layer has one cache tensor, of which attention reads keys and values. All ranks hold it whole:

    past_key_values.L.key                  [B, 1, C, kv_lora_rank + qk_rope_head_dim]

Layers without a window may have heads of another size, and another number of key/value heads, than those with one (Gemma 4).

With sinks, C is one more than the number of positions: every call writes a slot of zeros after its last token's, whose score is
the head's sink (networks/sinks.py).

Outputs: `hidden_states_out` [B, S, hidden], or `logits` float32 [B, N, vocabulary] on the last stage, and
`present_key_values.L.key / .value`. These share memory with the inputs of the same name, unless the cache is quantized (INT8 or
FP8): then every call writes the whole cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.model.config import ModelConfig
from orchestrator.model.quantization import LinearFormat
from orchestrator.model.stage import StageNetwork
from orchestrator.networks import layers, sinks
from orchestrator.networks.attention import LayerInputs, attention, causal_mask, chunk_mask, window_mask
from orchestrator.networks.graph import Dim, GraphWriter
from orchestrator.networks.kv_cache import past_name, present_name
from orchestrator.networks.latent import latent_attention
from orchestrator.networks.moe import experts_beside_mlp, moe_mlp
from orchestrator.networks.positions import query_scale, rotary
from orchestrator.networks.rendering import Rendering
from orchestrator.networks.rotary import check_rotary
from orchestrator.networks.shape import RankShape


@dataclass(frozen=True, slots=True)
class Part:
    """A value of the graph that other programs' models have too, [batch, tokens, hidden], to find where two models part."""

    layer: int | None
    """Layer within the stage; None: the embedding."""
    what: str
    """Name for people: embedding, attention's input, attention, MLP's input, MLP, or end of the layer."""
    value: str
    """Name in the graph."""


@dataclass(frozen=True, slots=True)
class Network:
    """A rank's graph and the initializers that are bound to it."""

    model: onnx.ModelProto
    tables: dict[str, npt.NDArray[np.float32]]
    """Initializers that are computed instead of loaded, in float32, to be cast to the graph's dtype."""
    unpacked: dict[str, LinearFormat]
    """Weights that are dequantized to float32 when they are bound -> stored format."""
    parts: tuple[Part, ...] = ()
    """In the order in which they are computed."""

    def weight_names(self) -> list[str]:
        """Return the names of the initializers that come from the rank's checkpoint."""
        external = onnx.TensorProto.EXTERNAL
        names = [tensor.name for tensor in self.model.graph.initializer if tensor.data_location == external]
        return [name for name in names if name not in self.tables]

    def weight_dtypes(self) -> dict[str, int]:
        """Return the ONNX dtype of every initializer that comes from the rank's checkpoint."""
        wanted = set(self.weight_names())
        return {tensor.name: tensor.data_type for tensor in self.model.graph.initializer if tensor.name in wanted}


def check_supported(config: ModelConfig) -> None:
    """Check that the graph can express `config`. Raises ArchitectureError otherwise."""
    check_rotary(config.rotary_scaling)
    layers.check_activation(config.hidden_act)


def decoder_network(network: StageNetwork, tp_rank: int, rendering: Rendering) -> Network:
    """Write the graph of a rank. Graphs of a stage differ between ranks only by experts and a vocabulary-split embedding.

    Raises ArchitectureError for a model that the graph cannot express.
    """
    stage = network.stage
    config = stage.config
    check_supported(config)
    shape = RankShape(
        stage, rendering.dtype, tp_rank, rendering.portable, rendering.halved, rendering.in_place, network.experts,
        rendering.runtime_layers,
    )  # fmt: skip
    graph = GraphWriter(f"stage{stage.pp_rank}")
    hidden = _inputs(graph, shape, rendering)
    turns = rotary(graph, network, rendering.dtype)
    factor = query_scale(graph, network, rendering.dtype)
    masks = [causal_mask(graph, "position_ids", past_name(0, "key"))]
    if config.sliding_window is not None:
        masks.append((chunk_mask if config.chunked_windows else window_mask)(graph, config.sliding_window))
    if config.attention_sinks:
        masks = [sinks.additive(graph, mask, rendering.dtype) for mask in masks]
    parts = [Part(None, "embedding", hidden)] if stage.is_first else []
    for layer in range(stage.num_layers):
        windowed = config.has_window(stage.first_layer + layer)
        rotation = turns.windowed if windowed else turns.everywhere
        rotation = rotation if config.has_rotary(stage.first_layer + layer) else ()
        scaled = factor if config.scales_queries(stage.first_layer + layer) else None
        has_values = config.has_values(stage.first_layer + layer)
        inputs = LayerInputs(layer, masks[-1] if windowed else masks[0], rotation, scaled, has_values)
        parts += _layer(graph, shape.of_layer(layer), hidden, inputs)
        hidden = parts[-1].value
    if stage.is_last:
        _logits(graph, shape, hidden, gather=network.gather_logits)
    else:
        graph.node("Identity", [hidden], "hidden_states_out")
        graph.output("hidden_states_out", rendering.dtype, ["batch", "tokens", config.hidden_size])
    for layer, name in _cache_names(shape, present_name):
        graph.output(name, shape.cache_dtype, _cache_shape(shape.of_layer(layer), rendering))
    return Network(graph.model(), turns.tables, graph.unpacked_weights, tuple(parts))


def _cache_names(shape: RankShape, name: Callable[[int, str], str]) -> list[tuple[int, str]]:
    """Return the layer and the name of each cache tensor."""
    return [(layer, name(layer, what)) for layer in range(shape.stage.num_layers) for what in shape.caches]


def _cache_shape(shape: RankShape, rendering: Rendering) -> list[Dim]:
    return ["batch", shape.num_kv_heads, rendering.cache_slots or "slots", shape.cache_head_size]


def _inputs(graph: GraphWriter, shape: RankShape, rendering: Rendering) -> str:
    stage, config = shape.stage, shape.config
    if stage.is_first:
        ids = graph.input("input_ids", "int64", ["batch", "tokens"])
        embedded = layers.embedding(graph, shape, ids)
        hidden = layers.scale(graph, embedded, config.embedding_multiplier, "embedding.scaled", shape.dtype)
    else:
        hidden = graph.input("hidden_states", shape.dtype, ["batch", "tokens", config.hidden_size])
    graph.input("position_ids", "int64", ["batch", "tokens"])
    graph.input("write_indices", "int64", ["batch"])
    if stage.is_last:
        graph.input("logit_indices", "int64", ["batch", "logit_tokens"])
    for layer, name in _cache_names(shape, past_name):
        graph.input(name, shape.cache_dtype, _cache_shape(shape.of_layer(layer), rendering))
    return hidden


def _layer(graph: GraphWriter, shape: RankShape, hidden: str, inputs: LayerInputs) -> list[Part]:
    """Add attention and MLP, each in a residual branch, with the model's norms. Returns the parts; the last is the layer's end."""
    config, prefix = shape.config, f"transformer.layers.{inputs.layer}"
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    # post_layernorm is the norm before the MLP, except in Gemma 2 and OLMo 2, where it follows attention.
    mlp_norm = "pre_feedforward_layernorm" if after else "post_layernorm"

    def norm(x: str, name: str, wanted: bool) -> str:
        return layers.norm(graph, shape, x, f"{prefix}.{name}", f"{prefix}.{name}.out") if wanted else x

    def residual(x: str, branch: str, output: str) -> str:
        scaled = layers.scale(graph, branch, config.residual_multiplier, f"{output}.scaled", shape.dtype)
        return graph.node("Add", [x, scaled], output)

    attend = latent_attention if config.is_latent else attention
    normed = norm(hidden, "input_layernorm", before)
    attended = attend(graph, shape, normed, inputs)
    hidden = residual(hidden, norm(attended, "post_layernorm", after), f"{prefix}.attention_residual")
    mlp_input = normed if config.parallel_blocks else norm(hidden, mlp_norm, before)
    if not config.has_experts(shape.stage.first_layer + inputs.layer):
        transformed = layers.gated_mlp(graph, shape, mlp_input, f"{prefix}.mlp")
    elif config.moe and config.moe.own_norms:
        transformed = experts_beside_mlp(graph, shape, hidden, mlp_input, prefix)
    else:
        transformed = moe_mlp(graph, shape, mlp_input, f"{prefix}.mlp")
    name, normed_again = f"{prefix}.mlp_residual", norm(transformed, "post_feedforward_layernorm", after)
    if config.layer_scalar:
        factor = graph.external(f"{prefix}.layer_scalar", shape.dtype, [1])
        end = graph.node("Mul", [residual(hidden, normed_again, f"{name}_unscaled"), factor], name)
    else:
        end = residual(hidden, normed_again, name)
    named = {"attention's input": normed, "attention": attended, "MLP's input": mlp_input, "MLP": transformed, "end": end}
    return [Part(inputs.layer, what, value) for what, value in named.items()]


def _logits(graph: GraphWriter, shape: RankShape, hidden: str, *, gather: bool) -> None:
    """Add the head, for the tokens of logit_indices only."""
    config = shape.config
    local = config.padded_vocab_size(shape.tp) // shape.tp
    indices = graph.node("Unsqueeze", ["logit_indices", graph.constant("axis_2", [2])], "logit_indices.3d")
    wanted = graph.node("GatherND", [hidden, indices], "wanted", batch_dims=1)
    normed = layers.norm(graph, shape, wanted, "transformer.ln_f", "final_norm")
    logits = layers.linear(graph, shape, normed, "lm_head", (local, config.hidden_size), bias=config.head_bias)
    width = local
    if gather and shape.tp > 1:
        # Collectives concatenate along axis 0, so the vocabulary axis is moved there and back. Padding is cut off last.
        first = graph.node("Transpose", [logits], "logits.vocab_first", perm=[2, 0, 1])
        gathered = layers.all_gather(graph, shape, first)
        back = graph.node("Transpose", [gathered], "logits.padded", perm=[1, 2, 0])
        bounds = [graph.constant("zero_1d", [0]), graph.constant("vocab_size", [config.vocab_size]), graph.constant("axis_2", [2])]
        logits, width = graph.node("Slice", [back, *bounds], "logits.gathered"), config.vocab_size
    wide = graph.node("Cast", [logits], "logits.wide", to=onnx.TensorProto.FLOAT)
    scaled = layers.scale(graph, wide, 1.0 / config.logits_scaling, "logits.scaled", "float32")
    capped = layers.soft_cap(graph, scaled, config.final_logit_softcapping, "logits.capped", "float32")
    graph.node("Identity", [capped], "logits")
    graph.output("logits", "float32", ["batch", "logit_tokens", width])
