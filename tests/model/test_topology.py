from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import TopologyError
from orchestrator.model.topology import (
    Coordinates,
    ParallelLimits,
    Topology,
    check,
    check_engines,
    legal_moe_ep,
    legal_tp,
    problems,
)

sizes = st.integers(1, 16)
limits_of = st.builds(
    ParallelLimits,
    num_hidden_layers=st.integers(1, 40),
    num_attention_heads=st.integers(1, 32),
    num_key_value_heads=st.integers(1, 32),
    intermediate_size=st.integers(1, 512),
)
LLAMA = ParallelLimits(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, intermediate_size=48)


@given(layers=st.integers(1, 200), pp=sizes)
def test_stages_even_partition_covers_every_layer_in_order_longer_ones_first(layers: int, pp: int) -> None:
    stages = Topology(1, pp).stages(layers)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert [len(stage) for stage in stages] == [layers // pp + (1 if stage < layers % pp else 0) for stage in range(pp)]


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_stages_explicit_partition_is_followed(counts: list[int]) -> None:
    stages = Topology(1, len(counts), tuple(counts)).stages(sum(counts))
    assert [len(stage) for stage in stages] == counts
    assert [layer for stage in stages for layer in stage] == list(range(sum(counts)))


@given(tp=sizes, pp=sizes)
def test_ranks_numbered_tp_fastest_each_once(tp: int, pp: int) -> None:
    topology = Topology(tp, pp)
    ranks = list(topology.ranks())
    assert [(place.pp_rank, place.tp_rank) for place in ranks] == [(stage, part) for stage in range(pp) for part in range(tp)]
    assert [place.rank for place in ranks] == list(range(topology.world_size))
    assert all(topology.rank(place.tp_rank, place.pp_rank) == place.rank for place in ranks)


def test_coordinates_of_a_middle_rank_are_its_stage_and_part() -> None:
    assert Topology(4, 2).coordinates(6) == Coordinates(rank=6, tp_rank=2, pp_rank=1)


@pytest.mark.parametrize("rank", [-1, 8])
def test_coordinates_outside_of_the_world_are_refused(rank: int) -> None:
    with pytest.raises(TopologyError, match=r"not in 0\.\.7"):
        Topology(4, 2).coordinates(rank)


@given(limits=limits_of, tp=st.integers(1, 40))
def test_legal_tp_lists_exactly_the_sizes_without_problems(limits: ParallelLimits, tp: int) -> None:
    assert (tp in legal_tp(limits)) == (problems(Topology(tp, 1), limits) == [])


@given(limits=limits_of)
def test_legal_tp_is_ascending_and_has_one(limits: ParallelLimits) -> None:
    found = legal_tp(limits)
    assert found[0] == 1
    assert found == sorted(set(found))


@given(limits=limits_of, tp=st.integers(1, 40))
def test_legal_tp_splits_heads_and_features_evenly(limits: ParallelLimits, tp: int) -> None:
    heads, kv_heads = limits.num_attention_heads, limits.num_key_value_heads
    splits = heads % tp == 0 and limits.intermediate_size % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    assert (tp in legal_tp(limits)) == splits


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        (Topology(3, 1), ["3 does not divide the 8 attention heads", "neither divides nor is a multiple of the 2"]),
        (Topology(16, 1), ["16 does not divide the 8 attention heads"]),
        (Topology(1, 7), ["pp=7 is greater than the model's 6 layers"]),
        (Topology(1, 2, (3, 2)), ["sums to 5, the model has 6"]),
        (Topology(1, 2, (2, 2, 2)), ["pp_partition has 3 stages, pp is 2"]),
        (Topology(1, 2, (6, 0)), ["a stage without layers"]),
        (Topology(3, 7), ["attention heads", "greater than the model's 6 layers"]),
    ],
)
def test_problems_illegal_topology_names_every_reason(topology: Topology, words: list[str]) -> None:
    found = "; ".join(problems(topology, LLAMA))
    for word in words:
        assert word in found


def test_problems_intermediate_size_that_does_not_divide_is_named() -> None:
    limits = ParallelLimits(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, intermediate_size=50)
    assert problems(Topology(4, 1), limits) == ["tp=4 does not divide intermediate_size 50"]


def test_check_illegal_topology_advises_the_legal_ones() -> None:
    with pytest.raises(TopologyError) as caught:
        check(Topology(3, 9), LLAMA)
    assert caught.value.exit_code == 11
    assert "tp in {1, 2, 4, 8}, pp from 1 to 6" in caught.value.advice


@given(limits=limits_of, tp=sizes, pp=sizes)
def test_check_agrees_with_problems(limits: ParallelLimits, tp: int, pp: int) -> None:
    topology = Topology(tp, pp)
    if problems(topology, limits):
        with pytest.raises(TopologyError):
            check(topology, limits)
    else:
        check(topology, limits)
        assert all(len(stage) >= 1 for stage in topology.stages(limits.num_hidden_layers))


@given(tp=sizes, cp=sizes, pp=sizes)
def test_ranks_with_context_parallelism_run_tp_then_cp_then_pp(tp: int, cp: int, pp: int) -> None:
    topology = Topology(tp, pp, cp=cp)
    ranks = list(topology.ranks())
    assert len(ranks) == topology.world_size == tp * cp * pp
    assert [(place.pp_rank, place.cp_rank, place.tp_rank) for place in ranks] == list(
        itertools.product(range(pp), range(cp), range(tp))
    )
    assert all(topology.rank(place.tp_rank, place.pp_rank, place.cp_rank) == place.rank for place in ranks)


@given(tp=sizes, cp=sizes, pp=sizes)
def test_file_number_is_that_of_tensorrt_llm_and_shared_by_cp_ranks(tp: int, cp: int, pp: int) -> None:
    topology = Topology(tp, pp, cp=cp)
    files = {place.rank: topology.file_number(place.tp_rank, place.pp_rank) for place in topology.ranks()}
    assert files == {rank: rank % tp + (rank // (tp * cp)) * tp for rank in range(tp * cp * pp)}
    assert Counter(files.values()) == dict.fromkeys(range(topology.num_files), cp)


EXPERTS = ParallelLimits(
    num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8, intermediate_size=0, num_experts=6, moe_intermediate_size=6
)


@pytest.mark.parametrize(
    ("topology", "words", "advice"),
    [
        (Topology(4, 1, moe_ep=3), "moe_ep=3 does not divide tp=4", "moe_ep in {2} with tp=4"),
        (Topology(8, 1, moe_ep=4), "moe_ep=4 does not divide the 6 experts", "no moe_ep with tp=8"),
        (Topology(4, 1, moe_ep=1), "tp / moe_ep = 4 does not divide the experts' intermediate size 6", "moe_ep in {2} with tp=4"),
        (Topology(8, 1, moe_ep=2), "tp / moe_ep = 4 does not divide", "tp in {2, 4} with moe_ep=2"),
        (Topology(2, 1, moe_ep=2, cp=2), "cp=2 and moe_ep=2 exclude each other", "cp=1 or moe_ep=1"),
        (Topology(1, 4, (1, 1, 1, 1)), "sums to 4, the model has 6", "a pp_partition such as [2, 2, 1, 1]"),
    ],
)
def test_check_illegal_experts_and_stages_advises_legal_ones(topology: Topology, words: str, advice: str) -> None:
    with pytest.raises(TopologyError, match=re.escape(words)) as caught:
        check(topology, EXPERTS)
    assert advice in caught.value.advice


@given(
    tp=st.integers(1, 8),
    ep=st.integers(1, 8),
    experts=st.integers(1, 12),
    size=st.integers(1, 24),
    heads=st.sampled_from([4, 6, 8]),
)
def test_legal_tp_and_legal_moe_ep_are_those_without_problems(tp: int, ep: int, experts: int, size: int, heads: int) -> None:
    limits = ParallelLimits(2, heads, heads, 0, experts, size)
    legal = problems(Topology(tp, 1, moe_ep=ep), limits) == []
    assert (tp in legal_tp(limits, ep)) == legal
    if heads % tp == 0:
        assert (ep in legal_moe_ep(tp, limits)) == legal


def test_check_engines_context_parallelism_is_refused() -> None:
    check_engines(Topology(4, 2))
    with pytest.raises(TopologyError, match="do not split sequences") as caught:
        check_engines(Topology(4, 2, cp=2))
    assert "convert --cp" in caught.value.advice
