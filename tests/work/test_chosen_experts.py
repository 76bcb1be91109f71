"""Verification of ranks that gather their experts: right ones pass, and each mistake in the list is caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.base.errors import VerificationError
from orchestrator.networks import chosen_experts
from orchestrator.networks.graph import GraphWriter
from orchestrator.networks.shape import RankShape
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from orchestrator.work.verify import inputs
from tests.integration.steps import run_steps
from tests.support.families import write_tiny

_FIRST, _MINE, _START = chosen_experts._first, chosen_experts.mine, chosen_experts._start


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tmp_path_factory.mktemp("store").as_uri()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("solar_open", tmp_path_factory.mktemp("model"))


def plan(source: Path, number: int = 0, moe_ep: int = 1) -> Plan:
    """A plan of a mixture of 8 experts, 2 chosen, with steps of its own: `number` goes into their digests."""
    plain = {
        "source": {"path": str(source)}, "topology": {"tp": moe_ep, "moe_ep": moe_ep},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64 - number, "experts": "gathered"},
        "verification": {"max_tokens": 12, "decode_steps": 3}, "release": {"name": "tiny", "version": "1"},
    }  # fmt: skip
    return preparation.plan(decode(BuildSpec, plain, "test"))


def verify(made: Plan, store: str) -> float:
    """The relative error of the last stage."""
    outcomes = run_steps(made, store, (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY))
    last = next(outcome for outcome in reversed(outcomes.values()) if outcome.kind is Kind.VERIFY)
    error: float = last.facts.verification.max_relative_error
    return error


@pytest.mark.parametrize("moe_ep", [1, 2])
def test_verification_of_gathered_experts_agrees_with_transformers(source: Path, store: str, moe_ep: int) -> None:
    assert verify(plan(source, 0, moe_ep), store) < 5e-6


def _counted_again(graph: GraphWriter, numbers: str, places: str, prefix: str) -> str:
    """Give every entry weight one, so that an expert that two tokens chose counts twice."""
    first = _FIRST(graph, numbers, places, prefix)
    return graph.node(
        "Add", [graph.node("Sub", [first, first], f"{prefix}.no"), graph.scalar("whole", 1.0, "float32")], f"{prefix}.yes"
    )


def _of_the_next(graph: GraphWriter, shape: RankShape, choices: str, prefix: str) -> tuple[str, str]:
    """Gather the rank's experts off by one."""
    mine, is_mine = _MINE(graph, shape, choices, prefix)
    shifted = graph.node("Add", [mine, graph.constant("one_1d", [1])], f"{prefix}.next")
    number = graph.constant(f"number_{shape.num_experts}", [shape.num_experts])
    return graph.node("Mod", [shifted, number], f"{prefix}.around"), is_mine


def _late_start(graph: GraphWriter, count: str, number: str, prefix: str) -> str:
    """Leave the first choice out where they are few; right where all experts are computed."""
    start = _START(graph, count, number, prefix)
    few = graph.node("Less", [start, count], f"{prefix}.begins")
    late = graph.node("Cast", [few], f"{prefix}.late", to=graph.onnx_dtype("int64"))
    return graph.node("Add", [start, late], f"{prefix}.later")


WRONG = {"_first": _counted_again, "mine": _of_the_next, "_start": _late_start}


@pytest.mark.parametrize("function", WRONG)
def test_verification_of_a_wrong_list_of_experts_fails(
    function: str, source: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen_experts, function, WRONG[function])
    with pytest.raises(VerificationError):
        verify(plan(source, 1 + list(WRONG).index(function), 1 if function == "_first" else 2), store)


def test_verification_without_the_repeated_step_misses_a_list_that_is_wrong_when_short(
    source: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason why the step is repeated: many sequences choose all experts."""
    monkeypatch.setattr(chosen_experts, "_start", _late_start)
    monkeypatch.setattr(inputs, "_REPEATED", ())
    assert verify(plan(source, 9, 2), store) < 5e-6
