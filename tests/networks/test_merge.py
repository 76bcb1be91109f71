"""The ranks of a stage as one graph: the same numbers as one rank alone, and as the ranks in lockstep."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.base.errors import VerificationError
from orchestrator.checkpoints import read_source
from orchestrator.families import FAMILIES
from orchestrator.model.config import ModelConfig
from orchestrator.model.config_hugging_face import from_hugging_face
from orchestrator.model.stage import StageNetwork, StageOptions
from orchestrator.model.topology import Topology
from orchestrator.networks import Network, Rendering, decoder_network
from orchestrator.networks.merge import merge_ranks
from orchestrator.work.miniature.prompts import prompts
from orchestrator.work.miniature.ranks import Ranks, convert
from orchestrator.work.verify.inputs import make_calls
from orchestrator.work.verify.lockstep import Lockstep
from orchestrator.work.verify.merged_stage import MergedStage
from tests.support.families import write_tiny

SLOTS = 16
TEXT = prompts([8], vocabulary=131)[-1]


def config_of(source: Path, family: str, **changes: Any) -> ModelConfig:
    index, _ = read_source(str(source))
    (architecture,) = FAMILIES[family].architectures
    config = from_hugging_face(index.config, architecture, "float32", FAMILIES[family].config)
    return config.model_copy(update=changes)


def graphs(config: ModelConfig, topology: Topology, pp_rank: int = 0) -> list[Network]:
    stage = StageOptions.of(config, topology, pp_rank)
    network = StageNetwork(stage=stage, max_seq_len=SLOTS)
    return [decoder_network(network, tp_rank, Rendering.executed()) for tp_rank in range(topology.tp)]


LAYOUTS = [
    ("llama", Topology(2, 1), {}),
    ("llama", Topology(4, 1), {}),  # key/value heads held twice
    ("llama", Topology(2, 2), {}),
    ("llama", Topology(2, 1), {"use_parallel_embedding": True}),
    ("llama", Topology(2, 1), {"use_parallel_embedding": True, "embedding_sharding_dim": 1}),
    ("olmo2", Topology(2, 1), {}),  # a collective inside the norms of queries and keys
    ("qwen2_moe", Topology(2, 1, moe_ep=2), {}),
]


@pytest.mark.parametrize(("family", "topology", "layout"), LAYOUTS, ids=str)
def test_merged_ranks_compute_what_one_rank_computes(
    family: str, topology: Topology, layout: dict[str, Any], tmp_path: Path
) -> None:
    source = write_tiny(family, tmp_path / "source", dtype="float32")
    found = []
    for name, each in (("one", Topology(1, 1)), ("many", topology)):
        config = config_of(source, family, **(layout if name == "many" else {}))
        weights = convert(source, tmp_path / name, FAMILIES[family], config, each)
        found.append(Ranks(config, each, weights, max_seq_len=32).logits(TEXT))
    one, many = found
    assert np.abs(many - one).max() < 1e-5 * np.abs(one).max()


@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "sliced"])
def test_merged_ranks_compute_what_the_ranks_compute_in_lockstep(gather: bool, tmp_path: Path) -> None:
    """Two texts at once, one of them padded."""
    topology = Topology(2, 1)
    source = write_tiny("llama", tmp_path / "source", dtype="float32")
    config = config_of(source, "llama")
    weights = convert(source, tmp_path / "ranks", FAMILIES["llama"], config, topology)
    tokens, lengths = np.array([TEXT.tokens[:12], TEXT.tokens[3:15]]), np.array([12, 9])
    calls = make_calls(tokens, lengths, decode_steps=3)
    network = StageNetwork(stage=StageOptions.of(config, topology, 0), max_seq_len=12, gather_logits=gather)
    expected = Lockstep(network, weights[0], calls, []).run()
    merged = MergedStage(network, weights[0])
    merged.reset(batch=2)
    for call, values in zip(calls, expected, strict=True):
        np.testing.assert_allclose(merged.run(call), values, rtol=0, atol=1e-5 * np.abs(values).max())


def test_merge_keeps_every_node_of_every_rank_and_each_meeting_once(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    models = [network.model for network in graphs(config_of(source, "llama"), Topology(2, 1))]
    merged = merge_ranks(models)
    one = Counter(node.op_type for node in models[0].graph.node)
    meetings = one.pop("DistCollective")
    found = Counter(node.op_type for node in merged.graph.node)
    assert found.pop("Sum") + found["Concat"] - 2 * one["Concat"] == meetings
    found["Concat"] = 2 * one["Concat"]
    assert +found == Counter({operator: 2 * count for operator, count in one.items()})
    names = [name for node in merged.graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_merge_shares_the_inputs_that_all_ranks_get_alike(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    config = config_of(source, "llama", num_hidden_layers=1)
    merged = merge_ranks([network.model for network in graphs(config, Topology(2, 1))])
    caches = [f"rank{rank}.past_key_values.0.{what}" for rank in range(2) for what in ("key", "value")]
    assert sorted(value.name for value in merged.graph.input) == sorted(
        ["input_ids", "position_ids", "write_indices", "logit_indices", *caches]
    )
    assert {"rank0.logits", "rank1.logits"} <= {value.name for value in merged.graph.output}


def test_merge_of_one_rank_is_that_rank(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    (network,) = graphs(config_of(source, "llama"), Topology(1, 1))
    merged = merge_ranks([network.model])
    assert [node.op_type for node in merged.graph.node] == [node.op_type for node in network.model.graph.node]


def test_merge_of_what_is_no_stage_is_refused(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    config = config_of(source, "llama")
    first, second = graphs(config, Topology(2, 2), 0)[0].model, graphs(config, Topology(2, 2), 1)[1].model
    with pytest.raises(ValueError, match="not ranks of one stage"):
        merge_ranks([first, second])
    with pytest.raises(ValueError, match="is among 2 ranks, 1 are merged"):
        merge_ranks([first])
    with pytest.raises(ValueError, match="no rank"):
        merge_ranks([])


def test_merged_stage_whose_ranks_disagree_is_refused(tmp_path: Path) -> None:
    """Each rank holds the whole embedding, and carries it in its own residual past every sum."""
    source = write_tiny("llama", tmp_path / "source", dtype="float32")
    config = config_of(source, "llama")
    topology = Topology(2, 2)
    weights = convert(source, tmp_path / "ranks", FAMILIES["llama"], config, topology)
    table = weights[0][1]["transformer.vocab_embedding.weight"]
    weights[0][1]["transformer.vocab_embedding.weight"] = replace(table, data=np.roll(table.data, 4 * table.shape[1]))
    with pytest.raises(VerificationError, match=r"rank 1 and rank 0 differ by .* in the output of stage 0"):
        Ranks(config, topology, weights, max_seq_len=32).logits(TEXT)
