"""What the plan of a mixture says of its experts: their form, why, and the weights that a decode step reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.report import describe_plan, experts_lines
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from tests.support.families import BASE, MOE, write_tiny

LAYERS, EXPERTS, CHOSEN = BASE["num_hidden_layers"], 8, MOE["num_experts_per_tok"]
EXPERT_BYTES = 3 * BASE["hidden_size"] * MOE["moe_intermediate_size"] * 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("solar_open", tmp_path_factory.mktemp("model"))


def plan(source: Path, **sections: Any) -> Plan:
    plain = {"source": {"path": str(source)}, "release": {"name": "tiny", "version": "1"}, **sections}
    return preparation.plan(decode(BuildSpec, plain, "test"))


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2), (2, 1)])
def test_plan_of_a_mixture_counts_the_weights_that_a_decode_step_reads(source: Path, tp: int, ep: int) -> None:
    (reads,) = plan(source, topology={"tp": tp, "moe_ep": ep}).decode_reads()
    local = EXPERTS // ep
    assert reads.dense - reads.gathered == LAYERS * (local - min(CHOSEN, local)) * EXPERT_BYTES // (tp // ep)
    shards = sum(step.estimate.write_bytes for step in plan(source, topology={"tp": tp, "moe_ep": ep}).of_kind(Kind.CONVERT))
    embedding = 2 * BASE["vocab_size"] * BASE["hidden_size"]
    assert reads.dense == shards // tp - embedding


def test_plan_of_a_mixture_says_the_form_of_its_experts_and_why(source: Path) -> None:
    made = plan(source, topology={"pp": 3})
    (line,) = experts_lines(made)
    assert line.startswith("experts of stages 0-2: gathered (a decode step with opt_batch_size 1 chooses up to 2 of a rank's 8).")
    assert [reads["form"] for reads in describe_plan(made)["decode_reads"]] == ["gathered"] * 3


def test_plan_of_quantized_experts_keeps_them_dense_and_says_why(source: Path) -> None:
    (line,) = experts_lines(plan(source, quantization={"algorithm": "W8A16"}))
    assert "experts of stage 0: dense (TensorRT gathers no quantized weights" in line


def test_plan_of_a_dense_model_says_nothing_of_experts(tiny_llama: Path) -> None:
    made = plan(tiny_llama)
    assert experts_lines(made) == []
    assert "decode_reads" not in describe_plan(made)


def test_form_of_the_experts_is_a_part_of_the_builds_identity(source: Path) -> None:
    keys = {plan(source, engine={"experts": form}).build_key for form in ("dense", "gathered")}
    assert len(keys) == 2
