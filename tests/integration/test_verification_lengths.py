"""Verification of what depends on the length of a text, and of what rounding hides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.base.errors import VerificationError
from orchestrator.planning import preparation
from orchestrator.planning.facts import Verification, VerifyFacts
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.releases.proof import check_networks
from tests.conftest import SpecMaker
from tests.integration.steps import WITHOUT_ENGINES, run_steps
from tests.support.families import write_tiny
from tests.support.tiny import write_tiny_llama

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 10.0, 12.0, 16.0], "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def scaled_llama(folder: Path, parameters: dict[str, Any], positions: int) -> Path:
    return write_tiny_llama(folder, rope_parameters=parameters, max_position_embeddings=positions)


def last_verification(outcomes: dict[str, Outcome]) -> Verification:
    (found,) = (outcome.facts.verification for outcome in outcomes.values() if isinstance(outcome.facts, VerifyFacts))
    return Verification.model_validate(found)


@pytest.mark.parametrize(
    ("parameters", "positions"),
    [(LONGROPE, 64), (DYNAMIC, 16), (YARN, 16), (LINEAR, 16)],
    ids=["longrope", "dynamic", "yarn", "linear"],
)
@pytest.mark.parametrize("max_tokens", [14, 18, 40], ids=["short", "crosses-while-decoding", "long"])
def test_verification_of_scaled_rotary_on_both_sides_of_the_trained_length_agrees_with_transformers(
    tmp_path: Path, store_url: str, make_spec: SpecMaker, parameters: dict[str, Any], positions: int, max_tokens: int
) -> None:
    """Sequences of 2/3 and all of max_tokens: with 18, one of them crosses the 16 trained positions in a decode step."""
    source = scaled_llama(tmp_path / "model", parameters, positions)
    spec = make_spec(source, verification={"max_tokens": max_tokens, "decode_steps": 4})
    assert last_verification(run_steps(preparation.plan(spec), store_url, WITHOUT_ENGINES)).max_relative_error < 2e-5


def test_reference_of_dynamic_scaling_forgets_a_longer_sequence(tmp_path: Path, store_url: str, make_spec: SpecMaker) -> None:
    """transformers keeps the base of the longest text: sequences of 40, 26 and 40 tokens, all beyond the 16 trained ones."""
    source = scaled_llama(tmp_path / "model", DYNAMIC, 16)
    spec = make_spec(source, verification={"max_tokens": 40, "decode_steps": 4})
    assert last_verification(run_steps(preparation.plan(spec), store_url, WITHOUT_ENGINES)).max_relative_error < 2e-5


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_verification_of_norms_that_add_one_is_exact_against_the_source(
    tmp_path: Path, store_url: str, make_spec: SpecMaker, family: str
) -> None:
    outcomes = run_steps(preparation.plan(make_spec(write_tiny(family, tmp_path / "model"))), store_url, WITHOUT_ENGINES)
    found = last_verification(outcomes)
    assert found.max_relative_error < 1e-5
    assert found.max_relative_error_to_source == found.max_relative_error  # bfloat16 in, bfloat16 out: nothing was rounded


def test_checkpoint_of_gemma_holds_norms_as_tensorrt_llm_does_and_exactly(
    tmp_path: Path, store_url: str, make_spec: SpecMaker
) -> None:
    source = write_tiny("gemma", tmp_path / "model")
    outcomes = run_steps(preparation.plan(make_spec(source)), store_url, (Kind.CONVERT,))
    (shard,) = outcomes["convert/stage0/group0"].outputs
    stored = load_file(Path(store_url.removeprefix("file://")) / shard.key)
    norm = load_file(source / "model.safetensors")["model.layers.1.input_layernorm.weight"].float()
    name = "transformer.layers.1.input_layernorm.weight"
    assert torch.equal(stored[name], (norm + 1).bfloat16())
    assert torch.equal(stored[f"{name}_float32"], norm + 1)
    assert not torch.equal(stored[name].float(), norm + 1)


def test_verification_of_a_rounded_build_reports_what_the_dtype_costs(tmp_path: Path, store_url: str, make_spec: SpecMaker) -> None:
    source = write_tiny_llama(tmp_path / "model", dtype="float32")
    found = last_verification(run_steps(preparation.plan(make_spec(source, dtype="bfloat16")), store_url, WITHOUT_ENGINES))
    assert found.max_relative_error < 1e-5
    assert found.max_relative_error_to_source is not None
    assert found.max_relative_error_to_source > 100 * found.max_relative_error


@pytest.mark.parametrize("family", ["gemma", "mixtral", "qwen3_moe"])
def test_verification_of_a_rounded_build_leaves_what_the_graph_reads_in_float32(
    tmp_path: Path, store_url: str, make_spec: SpecMaker, family: str
) -> None:
    source = write_tiny(family, tmp_path / "model", dtype="float32")
    found = last_verification(run_steps(preparation.plan(make_spec(source, dtype="bfloat16")), store_url, WITHOUT_ENGINES))
    assert found.max_relative_error < 1e-5


def test_publishing_of_an_engine_from_another_network_than_the_verified_is_refused(
    tmp_path: Path, store_url: str, make_spec: SpecMaker
) -> None:
    made = preparation.plan(make_spec(write_tiny_llama(tmp_path / "model"), topology={"tp": 2, "pp": 2}))
    outcomes = {outcome.digest: outcome for outcome in run_steps(made, store_url).values()}
    check_networks(made, outcomes)
    third = list(made.of_kind(Kind.BUILD))[2]
    for network in ("another", None):
        facts = outcomes[third.digest].facts.model_copy(update={"network": network})
        wrong = outcomes[third.digest].model_copy(update={"facts": facts})
        with pytest.raises(VerificationError, match="engines of ranks 2 were compiled from other networks than were verified"):
            check_networks(made, {**outcomes, third.digest: wrong})
