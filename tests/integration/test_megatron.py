"""Checkpoints that megatron-core wrote, converted and verified: the same rank files as from the Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.base.errors import SourceMissingError
from orchestrator.compat.models import DecoderModelForCausalLM
from orchestrator.compat.models import Mapping as Place
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind
from tests.integration.steps import run_steps
from tests.integration.test_formats import converted
from tests.support.megatron_fixtures import NAMES, unpack, write_model
from tests.support.synthetic import build_spec

TOPOLOGIES: tuple[dict[str, Any], ...] = ({}, {"tp": 4}, {"tp": 2, "pp": 2})


@pytest.mark.parametrize("name", NAMES)
def test_convert_of_a_megatron_checkpoint_equals_that_of_hugging_face(tmp_path: Path, name: str) -> None:
    source = write_model(name.partition("-")[0], tmp_path / "source")
    folder = unpack(name, tmp_path / "megatron")
    for number, topology in enumerate(TOPOLOGIES):
        expected = converted(source, tmp_path / f"expected{number}", topology)
        assert converted(folder, tmp_path / f"found{number}", topology) == expected, topology


@pytest.mark.parametrize(
    "name", ["llama-tp2-pp2", "llama31", "qwen2-tp2-pp2", "qwen3-tp2-pp2", "qwen3_moe-ep2-per-layer", "mixtral-ep2"]
)
def test_verification_of_a_megatron_checkpoint_agrees_with_transformers(tmp_path: Path, name: str) -> None:
    folder = unpack(name, tmp_path / "megatron")
    made = preparation.plan(build_spec(folder, dtype="bfloat16", topology={"tp": 2}))
    kinds = (Kind.MINIATURE, Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY)
    outcomes = run_steps(made, (tmp_path / "built").as_uri(), kinds)
    assert outcomes["verify/stage0"].facts.verification.max_relative_error < 1e-3


def test_from_nemo_reads_ranks_of_nemo_and_bridge(tmp_path: Path) -> None:
    source, place = write_model("llama", tmp_path / "source"), Place(tp_size=2, rank=1)
    expected = DecoderModelForCausalLM.from_hugging_face(source, mapping=place).weights()
    for name in ("llama-nemo", "llama-tp2-pp2"):
        found = DecoderModelForCausalLM.from_nemo(unpack(name, tmp_path / name), mapping=place).weights()
        assert {key: bytes(weight.data) for key, weight in found.items()} == {
            key: bytes(weight.data) for key, weight in expected.items()
        }
    with pytest.raises(SourceMissingError, match=r"no \.metadata beside \.distcp files"):
        DecoderModelForCausalLM.from_nemo(source)
