"""Every rank's graph, executed by ONNX Runtime in lockstep, against transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base.errors import VerificationError
from orchestrator.planning import preparation
from orchestrator.planning.facts import Verification
from orchestrator.planning.steps import Kind
from tests.conftest import SpecMaker
from tests.integration.steps import WITHOUT_ENGINES, forge, run_steps
from tests.support.smollm2 import smollm2
from tests.support.tiny import write_tiny_llama

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def verify(spec: Any, store: str) -> Verification:
    made = preparation.plan(spec)
    outcomes = run_steps(made, store, WITHOUT_ENGINES)
    last = [step.name for step in made.of_kind(Kind.VERIFY)][-1]
    return outcomes[last].facts.verification


def test_verification_needs_neither_an_mpi_library_nor_a_launcher(
    tmp_path: Path, store_url: str, make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # type: ignore[arg-type]  # an import of it fails
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = make_spec(write_tiny_llama(tmp_path / "model"), topology={"tp": 2, "pp": 2})
    assert verify(spec, store_url).max_relative_error < 5e-5


@pytest.mark.parametrize(
    ("topology", "changes"),
    [
        pytest.param({"tp": 2}, {}, id="tp2"),
        pytest.param({"tp": 4}, {}, id="tp4-kv-heads-duplicated"),
        pytest.param({"tp": 2, "pp": 2}, {"num_hidden_layers": 5}, id="tp2-pp2-uneven-5-layers"),
        pytest.param({"pp": 3, "pp_partition": [2, 1, 2]}, {"num_hidden_layers": 5}, id="pp3-explicit-partition"),
        pytest.param({"tp": 2, "pp": 2}, {"tie_word_embeddings": True}, id="tied-embeddings"),
        pytest.param({"tp": 2}, {"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"tp": 2}, {"rope_parameters": LLAMA3_ROPE}, id="llama3-rotary-scaling"),
        pytest.param({"tp": 2}, {"mistral": True, "sliding_window": 5}, id="mistral-sliding-window"),
        pytest.param({"tp": 2}, {"head_dim": 24}, id="head-size-apart-from-hidden-size"),
        pytest.param({"tp": 2}, {"dtype": "float16"}, id="float16"),
    ],
)
def test_verification_of_a_tiny_model_agrees_with_transformers(
    tmp_path: Path, store_url: str, make_spec: SpecMaker, topology: dict[str, Any], changes: dict[str, Any]
) -> None:
    source = write_tiny_llama(tmp_path / "model", **changes)
    found = verify(make_spec(source, topology=topology), store_url)
    assert found.num_positions == 12 + 8 + 12
    assert found.max_relative_error < 1e-3
    assert found.mean_kl < 1e-6
    assert found.top1_agreement == 1.0


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_verification_of_a_split_embedding_agrees_with_transformers(
    tmp_path: Path, store_url: str, make_spec: SpecMaker, dim: int, tied: bool
) -> None:
    source = write_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    conversion = {"use_parallel_embedding": True, "embedding_sharding_dim": dim}
    found = verify(make_spec(source, topology={"tp": 2}, conversion=conversion), store_url)
    assert found.max_relative_error < 1e-3
    assert found.top1_agreement == 1.0


def test_verification_of_local_logits_joins_the_ranks_vocabularies(tiny_llama: Path, store_url: str, make_spec: SpecMaker) -> None:
    engine = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64, "gather_logits": False}
    found = verify(make_spec(tiny_llama, topology={"tp": 2}, engine=engine), store_url)
    assert found.max_relative_error < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_verification_of_smollm2_on_real_text_agrees_with_transformers(
    tmp_path_factory: pytest.TempPathFactory, make_spec: SpecMaker, tp: int, pp: int
) -> None:
    store = (tmp_path_factory.getbasetemp() / "smollm2-store").as_uri()  # shared: the reference is computed once
    spec = make_spec(smollm2(), topology={"tp": tp, "pp": pp}, verification={})
    found = verify(spec, store)
    assert found.num_positions >= 64
    assert found.max_relative_error < 1e-3
    assert found.top1_agreement == 1.0


def test_verification_of_a_config_that_lies_fails_the_step(tmp_path: Path, store_url: str, make_spec: SpecMaker) -> None:
    source = write_tiny_llama(tmp_path / "model")
    made = preparation.plan(make_spec(source))
    run_steps(made, store_url, (Kind.REFERENCE,))
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (source / "config.json").write_text(json.dumps(config))
    lying = preparation.plan(make_spec(source))
    truthful = {step.name: step for step in made.steps}
    steps = tuple(
        truthful["reference"]
        if step.kind is Kind.REFERENCE
        else step.model_copy(update={"needs": _with_reference(step, lying, truthful)})
        for step in lying.steps
    )
    with pytest.raises(VerificationError, match="relative error"):
        run_steps(type(lying)(lying.spec, lying.inputs, steps), store_url, WITHOUT_ENGINES)


def _with_reference(step: Any, lying: Any, truthful: Any) -> tuple[str, ...]:
    replaced = next(other for other in lying.steps if other.kind is Kind.REFERENCE).digest
    return tuple(truthful["reference"].digest if need == replaced else need for need in step.needs)


def test_verification_of_a_wrong_shard_fails_the_step(tiny_llama: Path, tmp_path: Path, make_spec: SpecMaker) -> None:
    store = tmp_path / "store"
    made = preparation.plan(make_spec(tiny_llama, topology={"tp": 2}))
    outcomes = run_steps(made, store.as_uri(), (Kind.REFERENCE, Kind.CONVERT))
    first, second = (store / output.key for output in outcomes["convert/stage0/group0"].outputs)
    second.unlink()
    second.write_bytes(first.read_bytes())
    forge(store, outcomes["convert/stage0/group0"])
    with pytest.raises(VerificationError):
        run_steps(made, store.as_uri(), WITHOUT_ENGINES)
