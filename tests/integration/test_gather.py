"""Conversions to any topologies, gathered back, are the source: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.checkpoints.compare import compare
from orchestrator.compat.models import LLaMAForCausalLM, Mapping
from orchestrator.model.config import ModelConfig
from orchestrator.model.topology import Topology, legal_tp
from tests.support.strategies import parallel_models
from tests.support.synthetic import random_arrays, write_source


@st.composite
def two_topologies(draw: st.DrawFn) -> tuple[ModelConfig, Topology, Topology]:
    config, first = draw(parallel_models())
    pp = draw(st.integers(1, config.num_hidden_layers))
    return config, first, Topology(draw(st.sampled_from(legal_tp(config.limits()))), pp)


def converted(source: Path, topology: Topology, output: Path) -> Path:
    for rank in range(topology.world_size):
        mapping = Mapping(topology.tp, topology.pp, rank, topology.pp_partition)
        LLaMAForCausalLM.from_hugging_face(source, dtype="bfloat16", mapping=mapping).save_checkpoint(output, save_config=rank == 0)
    return output


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models=two_topologies(), seed=st.integers(0, 2**16))
def test_gather_of_any_two_conversions_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, models: tuple[ModelConfig, Topology, Topology], seed: int
) -> None:
    config, first, second = models
    folder = tmp_path_factory.mktemp("gather")
    source = write_source(folder / "source", config, random_arrays(config, seed=seed))
    one, other = converted(source, first, folder / "one"), converted(source, second, folder / "other")
    for pair in ((one, other), (source, one), (source, other)):
        assert compare(str(pair[0]), str(pair[1])).same, pair
