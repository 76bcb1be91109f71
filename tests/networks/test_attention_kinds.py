"""Latent attention and sinks in the graph of a rank: the caches that it takes, and what a sink does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.engines.profiles import network_of, rank_profiles, resolved
from orchestrator.model.config import ModelConfig
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks import Rendering, decoder_network
from orchestrator.spec.build import BuildConfig
from orchestrator.work.verify.ort import open_session, ort_value
from tests.networks.test_networks import config

Floats = npt.NDArray[np.float32]
LATENT: dict[str, Any] = {
    "num_key_value_heads": 1, "head_size": 20, "rotary_embedding_dim": 8, "kv_lora_rank": 24, "q_lora_rank": 28,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "rotary_interleaved": True,
}  # fmt: skip
SLOTS = 12


def stage_network(model: ModelConfig, tp: int = 1) -> StageNetwork:
    return StageNetwork(stage=StageOptions.of(model, Topology(tp, 1), 0), max_seq_len=SLOTS)


def caches(network: StageNetwork, rendering: Rendering) -> dict[str, list[Any]]:
    inputs = decoder_network(network, 0, rendering).model.graph.input
    shapes = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inputs}
    return {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.0.")}


def test_latent_attention_has_one_cache_tensor_which_every_rank_holds_whole() -> None:
    network = stage_network(config(**LATENT), tp=2)
    assert caches(network, Rendering.compiled(network)) == {"past_key_values.0.key": ["batch", 1, SLOTS, 32]}


def test_latent_attention_for_genai_has_two_halves_of_its_cache() -> None:
    halves = {f"past_key_values.0.{what}": ["batch", 1, "slots", 16] for what in ("key", "value")}
    assert caches(stage_network(config(**LATENT)), Rendering.for_genai()) == halves


@pytest.mark.parametrize("kind", [LATENT, {"attention_sinks": True}], ids=["latent", "sinks"])
def test_profiles_have_the_caches_of_the_compiled_graph(kind: dict[str, Any]) -> None:
    model = config(**kind)
    engine = resolved(model, BuildConfig(max_batch_size=2, max_input_len=4, max_seq_len=SLOTS))
    network = network_of(stage_network(model).stage, engine)
    shapes = rank_profiles(network, engine)[0].shapes
    wanted = caches(network, Rendering.compiled(network))
    assert {name: list(shapes[name][2]) for name in wanted} == {name: [2, *shape[1:]] for name, shape in wanted.items()}
    assert {name for name in shapes if name.startswith("past_key_values.0.")} == wanted.keys()


def test_sinks_take_one_more_slot_than_there_are_positions() -> None:
    network = stage_network(config(attention_sinks=True))
    assert caches(network, Rendering.compiled(network))["past_key_values.0.value"] == ["batch", 2, SLOTS + 1, 16]


def logits_with_sinks(sink: float | None, *, in_place: bool = True, silent: bool = False) -> Floats:
    """Logits of a prefill of two texts, one padded, and of a decoded token, from random weights; with `silent`, without attention.

    Unwritten slots hold large numbers.
    """
    model = config(num_hidden_layers=2, sliding_window=3, window_layers=(True, False), attention_sinks=sink is not None)
    network = decoder_network(stage_network(model), 0, replace(Rendering.executed(), in_place=in_place))
    generator = np.random.default_rng(5)
    bound = {}
    for tensor in network.model.graph.initializer:
        name = tensor.name
        if name in network.tables:
            bound[name] = ort_value(network.tables[name])
        elif name.endswith(".sinks"):
            bound[name] = ort_value(np.full(tensor.dims, sink, np.float32))
        elif name in network.weight_names():
            values = generator.standard_normal(tuple(tensor.dims), np.float32) * 0.3
            bound[name] = ort_value(values * np.float32(not (silent and name.endswith("dense.weight"))))
    session = open_session(network.model.SerializeToString(), bound)
    names = [value.name for value in session.get_outputs()]
    cache = {value.name: np.full((2, 2, SLOTS + 1, 16), 1e4, np.float32) for value in session.get_inputs() if "past_" in value.name}
    found = []
    for ids, positions in (([[3, 7, 9, 4], [8, 2, 0, 0]], [[0, 1, 2, 3], [0, 1, 0, 0]]), ([[5], [6]], [[4], [2]])):
        first = np.array([row[0] for row in positions], np.int64)
        given = {
            "input_ids": np.array(ids), "position_ids": np.array(positions), "write_indices": first,
            "logit_indices": np.array([[len(ids[0]) - 1], [min(len(ids[1]), 2) - 1]]),
        }  # fmt: skip
        results = dict(zip(names, session.run(names, {**given, **cache}), strict=True))
        cache = {name: results[name.replace("past_", "present_")] for name in cache}
        found.append(results["logits"])
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "whole"])
def test_sink_of_a_very_low_score_changes_nothing(in_place: bool) -> None:
    np.testing.assert_allclose(logits_with_sinks(-1e4, in_place=in_place), logits_with_sinks(None), atol=2e-5)


def test_sink_of_a_very_high_score_silences_attention() -> None:
    np.testing.assert_allclose(logits_with_sinks(1e4), logits_with_sinks(None, silent=True), atol=2e-5)


def test_sink_of_a_usual_score_changes_logits() -> None:
    assert np.abs(logits_with_sinks(0.5) - logits_with_sinks(None)).max() > 0.01
