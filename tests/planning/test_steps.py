from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.base.errors import DtypeError, OrchestratorError, StepFailedError, error_classes
from orchestrator.planning.steps import Estimate, Failure, FailureKind, Kind, Outcome, Output, Resources, Step, Task

BASE: dict[str, Any] = {"kind": Kind.CONVERT, "version": 1, "name": "convert/stage0/group0", "options": {"shards": ["a"], "n": 1.5}}
OUTCOME = Outcome(
    digest="d" * 64,
    name="convert/stage0/group0",
    kind=Kind.CONVERT,
    outputs=(Output(name="rank0.safetensors", key="steps/d/a/rank0.safetensors", num_bytes=3, sha256="0" * 64),),
    facts={"source_bytes_read": 10, "nested": {"list": [1, None, "é"]}},
    node="n",
    started_at="2026-01-01T00:00:00+00:00",
    seconds=1.25,
    tools={"torch": "2"},
    log_tail="last\nlines",
)


def step(**changes: Any) -> Step:
    return Step(**{**BASE, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another"},
        {"locations": {"source": "/elsewhere"}},
        {"resources": Resources(cpus=8, gpus=1, memory_bytes=5)},
        {"estimate": Estimate(read_bytes=1, write_bytes=2, seconds=3)},
        {"options": {"n": 1.5, "shards": ["a"]}},
    ],
    ids=str,
)
def test_digest_name_place_resources_and_estimate_do_not_matter(changes: dict[str, Any]) -> None:
    assert step(**changes).digest == step().digest


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.BUILD},
        {"version": 2},
        {"options": {"shards": ["b"], "n": 1.5}},
        {"options": {"shards": ["a"], "n": 1.5, "more": None}},
        {"needs": ("a" * 64,)},
    ],
    ids=str,
)
def test_digest_kind_version_options_and_needs_matter(changes: dict[str, Any]) -> None:
    assert step(**changes).digest != step().digest


def test_digest_order_of_needs_matters() -> None:
    assert step(needs=("a", "b")).digest != step(needs=("b", "a")).digest


def test_digest_is_stable_over_releases() -> None:
    assert step().digest == "1acf881adfe073d3bc0caed834e630eb6b3388d1ae9e8f932e670ceae78340f1"


def test_digest_copy_with_other_options_has_its_own() -> None:
    original = step()
    assert original.digest
    copied = original.model_copy(update={"options": {"shards": ["b"]}})
    assert copied.digest == step(options={"shards": ["b"]}).digest


def test_step_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        step().version = 2


def test_task_survives_json() -> None:
    wanted = step(needs=(OUTCOME.digest,), locations={"source": "/models/a b"}, resources=Resources(gpus=1))
    task = Task(step=wanted, inputs={OUTCOME.digest: OUTCOME}, attempt=3, store="s3://bucket/prefix", scratch="/scratch")
    assert wanted.digest  # a digest that was asked for before must not travel as a field
    back = Task.model_validate_json(task.model_dump_json())
    assert back == task
    assert back.step.digest == wanted.digest


def test_outcome_survives_json() -> None:
    assert Outcome.model_validate_json(OUTCOME.model_dump_json(indent=1)) == OUTCOME


@pytest.mark.parametrize("kind", list(FailureKind))
def test_failure_survives_json(kind: FailureKind) -> None:
    failure = Failure(kind=kind, message="m", error="DtypeError", advice="a", node="n", log_tail="l")
    assert Failure.model_validate_json(failure.model_dump_json()) == failure


def test_outcome_with_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Outcome.model_validate({**OUTCOME.model_dump(), "colour": "red"})


def test_outcome_output_is_found_by_name() -> None:
    assert OUTCOME.output("rank0.safetensors") is OUTCOME.outputs[0]
    with pytest.raises(KeyError, match=r"has no output 'rank1\.safetensors'"):
        OUTCOME.output("rank1.safetensors")


def test_failure_of_our_error_comes_back_as_the_same_error() -> None:
    failure = Failure.of(DtypeError("70000 does not fit", "use bfloat16"), node="n", log_tail="log")
    assert failure.kind is FailureKind.APPLICATION
    assert (failure.node, failure.log_tail) == ("n", "log")
    error = failure.to_error("convert/stage0/group0")
    assert type(error) is DtypeError
    assert error.message == "convert/stage0/group0: 70000 does not fit"
    assert error.advice == "use bfloat16"
    assert error.exit_code == 28


@pytest.mark.parametrize("cls", sorted(error_classes().values(), key=lambda cls: cls.__name__))
def test_failure_every_error_class_comes_back_with_its_exit_code(cls: type[OrchestratorError]) -> None:
    failure = Failure.model_validate_json(Failure.of(cls("message", "advice")).model_dump_json())
    error = pickle.loads(pickle.dumps(failure.to_error("step")))
    assert type(error) is cls
    assert (error.message, error.advice, error.exit_code) == ("step: message", "advice", cls.exit_code)


def test_failure_of_a_foreign_error_becomes_a_failed_step() -> None:
    failure = Failure.of(ZeroDivisionError("division by zero"))
    assert failure.message == "ZeroDivisionError: division by zero"
    error = failure.to_error("build/rank0")
    assert type(error) is StepFailedError
    assert error.advice == StepFailedError.default_advice


def test_failure_of_the_machinery_becomes_a_failed_step() -> None:
    error = Failure(kind=FailureKind.INFRASTRUCTURE, message="node lost").to_error("build/rank0")
    assert type(error) is StepFailedError
    assert error.exit_code == 23
