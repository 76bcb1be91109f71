"""The graph of a rank: its interface, its rotary tables, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orchestrator.base.errors import ArchitectureError
from orchestrator.model.config import ModelConfig
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks import Network, Rendering, check_supported, decoder_network
from orchestrator.networks.positions import rotary_tables
from orchestrator.networks.rotary import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    fields = {
        "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 16, "intermediate_size": 96, "hidden_act": "silu",
        "norm_epsilon": 1e-5, "max_position_embeddings": 131072, "rotary_base": 500000.0,
    }  # fmt: skip
    return ModelConfig.model_validate({**fields, **changes})


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=["plain", "llama3", "linear"])
def test_rotary_frequencies_equal_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=131072, rope_parameters=parameters)
    )
    ours, factor = inverse_frequencies(config(rotary_scaling=scaling))
    assert factor == pytest.approx(theirs.attention_scaling)
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=2e-6)


def test_rotary_tables_are_float32_and_start_at_zero() -> None:
    cos, sin = rotary_tables(config(), 10)
    assert cos.shape == sin.shape == (10, 8)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_array_equal(cos[0], 1)
    np.testing.assert_array_equal(sin[0], 0)


@pytest.mark.parametrize("changes", [{"rotary_scaling": {"rope_type": "novel"}}, {"hidden_act": "relu6"}])
def test_network_of_an_unsupported_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match="not supported"):
        check_supported(config(**changes))


def compiled(topology: Topology, pp_rank: int = 0) -> Network:
    network = StageNetwork(stage=StageOptions.of(config(), topology, pp_rank), max_seq_len=32)
    return decoder_network(network, 0, Rendering.compiled(network))


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_network_stages_meet_at_hidden_states() -> None:
    first, last = (compiled(Topology(2, 2), rank).model.graph for rank in (0, 1))
    assert names(first.input)[:3] == ["input_ids", "position_ids", "write_indices"]
    assert names(first.output)[0] == "hidden_states_out"
    assert names(last.input)[:4] == ["hidden_states", "position_ids", "write_indices", "logit_indices"]
    assert names(last.output)[0] == "logits"
    assert sum(name.startswith("past_key_values.") for name in names(first.input)) == 2 * 3
    assert sum(name.startswith("present_key_values.") for name in names(last.output)) == 2 * 2


def test_network_with_tensor_parallel_ranks_reduces_twice_per_layer() -> None:
    def collectives(tp: int) -> int:
        graph = compiled(Topology(tp, 1)).model.graph
        return sum(node.op_type == "DistCollective" for node in graph.node)

    assert collectives(1) == 0
    assert collectives(2) == 2 * 5 + 1  # and one gather of the logits


def test_network_holds_no_weights() -> None:
    network = compiled(Topology(1, 1))
    assert len(network.model.SerializeToString()) < 100_000
    assert "transformer.layers.4.mlp.proj.weight" in network.weight_names()
    assert "rotary_cos" not in network.weight_names()
