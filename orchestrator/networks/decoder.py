"""The decoder's graph for one rank: prefill and decode in one.

Inputs, with B sequences, S tokens each, C cache slots:

    input_ids      int64 [B, S]            first stage; hidden_states [B, S, hidden] on the others
    position_ids   int64 [B, S]            position of each token in its sequence, which is its cache slot
    write_indices  int64 [B]               first slot to write; position_ids[:, 0]
    logit_indices  int64 [B, N]            last stage: the tokens (0..S-1) whose logits are wanted
    past_key_values.L.key / .value         [B, kv_heads, C, head_size], L counts within the stage

Outputs: `hidden_states_out` [B, S, hidden], or `logits` float32 [B, N, vocabulary] on the last stage, and
`present_key_values.L.key / .value`, which share memory with the inputs of the same name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from orchestrator.core.errors import ArchitectureError
from orchestrator.core.model_config import ModelConfig
from orchestrator.core.options import StageOptions
from orchestrator.networks import layers
from orchestrator.networks.graph import Dim, GraphWriter
from orchestrator.networks.layers import RankShape
from orchestrator.networks.rotary import check_rotary, rotary_tables


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """What the graph depends on besides the stage."""

    dtype: str
    """float16, bfloat16 or float32: of weights, activations and cache."""
    max_seq_len: int
    """Rows of the rotary tables."""
    cache_slots: int | None
    """Fixed number of cache slots (TensorRT wants it static); None: dynamic."""
    gather_logits: bool = True


@dataclass(frozen=True, slots=True)
class Network:
    """A rank's graph and what is bound to it."""

    model: onnx.ModelProto
    tables: dict[str, npt.NDArray[np.float32]]
    """Initializers that are computed, not loaded: float32, to be cast to the graph's dtype."""

    def weight_names(self) -> list[str]:
        """Initializers that come from the rank's checkpoint."""
        external = onnx.TensorProto.EXTERNAL
        names = [tensor.name for tensor in self.model.graph.initializer if tensor.data_location == external]
        return [name for name in names if name not in self.tables]


def check_supported(config: ModelConfig) -> None:
    """Raises ArchitectureError when the graph cannot express `config`."""
    check_rotary(config.rotary_scaling)
    if config.hidden_act not in ("silu", "swish"):
        raise ArchitectureError(f"activation {config.hidden_act!r} is not supported", "Supported: silu.")


def decoder_network(stage: StageOptions, options: NetworkOptions) -> Network:
    """Write the graph of any rank of `stage`: tensor-parallel ranks of a stage share one graph. Raises ArchitectureError."""
    check_supported(stage.config)
    shape = RankShape(stage.config, stage.tp, options.dtype)
    graph = GraphWriter(f"stage{stage.pp_rank}")
    hidden = _inputs(graph, stage, shape, options)
    for table in ("rotary_cos", "rotary_sin"):
        graph.external(table, options.dtype, [options.max_seq_len, stage.config.head_size // 2])
    mask = layers.causal_mask(graph, shape, "position_ids", layers.past_name(0, "key"))
    for layer in range(stage.num_layers):
        hidden = _layer(graph, shape, hidden, layer, mask)
    if stage.is_last:
        _logits(graph, stage, shape, hidden, options)
    else:
        graph.node("Identity", [hidden], "hidden_states_out")
        graph.output("hidden_states_out", options.dtype, ["batch", "tokens", stage.config.hidden_size])
    for layer in range(stage.num_layers):
        for what in ("key", "value"):
            graph.output(layers.present_name(layer, what), options.dtype, _cache_shape(shape, options))
    cos, sin = rotary_tables(stage.config, options.max_seq_len)
    return Network(graph.model(), {"rotary_cos": cos, "rotary_sin": sin})


def _cache_shape(shape: RankShape, options: NetworkOptions) -> list[Dim]:
    return ["batch", shape.num_kv_heads, options.cache_slots or "slots", shape.config.head_size]


def _inputs(graph: GraphWriter, stage: StageOptions, shape: RankShape, options: NetworkOptions) -> str:
    config = stage.config
    if stage.is_first:
        ids = graph.input("input_ids", "int64", ["batch", "tokens"])
        table = graph.external("transformer.vocab_embedding.weight", options.dtype, [config.vocab_size, config.hidden_size])
        hidden = graph.node("Gather", [table, ids], "embedding", axis=0)
    else:
        hidden = graph.input("hidden_states", options.dtype, ["batch", "tokens", config.hidden_size])
    graph.input("position_ids", "int64", ["batch", "tokens"])
    graph.input("write_indices", "int64", ["batch"])
    if stage.is_last:
        graph.input("logit_indices", "int64", ["batch", "logit_tokens"])
    for layer in range(stage.num_layers):
        for what in ("key", "value"):
            graph.input(layers.past_name(layer, what), options.dtype, _cache_shape(shape, options))
    return hidden


def _layer(graph: GraphWriter, shape: RankShape, hidden: str, layer: int, mask: str) -> str:
    prefix = f"transformer.layers.{layer}"
    normed = layers.rms_norm(graph, shape, hidden, f"{prefix}.input_layernorm.weight", f"{prefix}.input_norm")
    attended = layers.attention(graph, shape, normed, layer, mask)
    hidden = graph.node("Add", [hidden, attended], f"{prefix}.attention_residual")
    normed = layers.rms_norm(graph, shape, hidden, f"{prefix}.post_layernorm.weight", f"{prefix}.post_norm")
    return graph.node("Add", [hidden, layers.gated_mlp(graph, shape, normed, layer)], f"{prefix}.mlp_residual")


def _logits(graph: GraphWriter, stage: StageOptions, shape: RankShape, hidden: str, options: NetworkOptions) -> None:
    """Take the wanted tokens first, so that the head is computed for them alone."""
    config = stage.config
    local = config.padded_vocab_size(stage.tp) // stage.tp
    indices = graph.node("Unsqueeze", ["logit_indices", graph.constant("axis_2", [2])], "logit_indices.3d")
    wanted = graph.node("GatherND", [hidden, indices], "wanted", batch_dims=1)
    normed = layers.rms_norm(graph, shape, wanted, "transformer.ln_f.weight", "final_norm")
    logits = layers.linear(graph, shape, normed, "lm_head", (local, config.hidden_size))
    width = local
    if options.gather_logits and stage.tp > 1:
        # Collectives concatenate along axis 0, so the vocabulary goes there and back; padding is cut off after.
        first = graph.node("Transpose", [logits], "logits.vocab_first", perm=[2, 0, 1])
        gathered = layers.all_gather(graph, shape, first)
        back = graph.node("Transpose", [gathered], "logits.padded", perm=[1, 2, 0])
        bounds = [graph.constant("zero_1d", [0]), graph.constant("vocab_size", [config.vocab_size]), graph.constant("axis_2", [2])]
        logits, width = graph.node("Slice", [back, *bounds], "logits.gathered"), config.vocab_size
    graph.node("Cast", [logits], "logits", to=onnx.TensorProto.FLOAT)
    graph.output("logits", "float32", ["batch", "logit_tokens", width])
