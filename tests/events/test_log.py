"""A driver's log, read back in pieces: its events, and the result of its build or the error again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import DriverLostError, OrchestratorError, TerminatedError, error_classes
from orchestrator.events import (
    Errored,
    Event,
    Planned,
    Published,
    StepFailed,
    StepProgressed,
    StepRetried,
    StepsFinished,
    StepStarted,
    StepSucceeded,
    decode_line,
    encode_line,
)
from orchestrator.events.log import LogReader, conclude
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from tests.conftest import SpecMaker
from tests.support.plans import LOST, outcome_of
from tests.support.synthetic import model_config, random_arrays, write_source

PUBLISHED = {"event": "published", "time": "2026-01-01T00:00:00Z", "manifest": "s3://b/releases/tiny/1/manifest.json"}


@pytest.fixture
def plan(tmp_path: Path, make_spec: SpecMaker) -> Plan:
    config = model_config()
    return preparation.plan(make_spec(write_source(tmp_path / "source", config, random_arrays(config))))


@pytest.fixture
def log(plan: Plan) -> str:
    """What a driver prints of a build with a lost and a repeated step, among lines of others."""
    lines = [encode_line(event) for event in events(plan)]
    others = ['{"event": "of a newer driver"}', '{"not": "ours"}', "[1]", "{broken"]
    return "\n".join([lines[0], "2026-01-01 INFO a library speaks", *lines[1:-1], *others, lines[-1]]) + "\n"


def events(plan: Plan) -> list[Event]:
    step = plan.steps[0]
    attempt: dict[str, Any] = {"digest": step.digest, "step": step.name, "node": "n1", "attempt": 1, "time": 1e9}
    return [
        Planned.of(plan, plan.steps).model_copy(update={"time": 1e9}),
        StepStarted(**attempt),
        StepFailed(**attempt, failure=LOST),
        StepRetried(digest=step.digest, step=step.name, attempt=2, delay_seconds=4.0, time=1e9),
        StepProgressed(**attempt, phase="convert", done=1, total=2, unit="bytes"),
        StepSucceeded(**attempt, outcome=outcome_of(step)),
        StepsFinished(ran=(step.name,), time=1e9),
        Published(manifest="s3://b/releases/tiny/1/manifest.json", steps_run=3, time=1e9),
    ]


def test_log_of_a_build_becomes_its_events_in_order(plan: Plan, log: str) -> None:
    reader = LogReader()
    assert reader.feed(log) == events(plan)
    assert reader.last_word == events(plan)[-1]


LINES = [
    '{"event": "finish", "time": "2026-01-01T00:00:00Z", "ran": ["convert/é"]}',
    "a library speaks",
    '{"event": "retry", "time": "2026-01-01T00:00:00Z", "digest": "d", "attempt": 2, "delay_seconds": 1.5}',
    "",
    json.dumps(PUBLISHED),
]


@given(st.data())
def test_log_cut_anywhere_gives_every_event_once(data: st.DataObject) -> None:
    text = "\n".join(LINES) + "\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    whole = LogReader().feed(text)
    in_pieces = LogReader()
    pieces: list[Event] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += in_pieces.feed(text[begin:end])
    assert pieces == whole
    assert len(whole) == 3


def test_log_without_a_last_newline_is_read_when_closed() -> None:
    reader = LogReader()
    assert reader.feed(json.dumps(PUBLISHED)) == []
    assert [type(event) for event in reader.close()] == [Published]
    assert reader.close() == []


@pytest.mark.parametrize("cls", error_classes().values(), ids=lambda cls: cls.__name__)
def test_last_error_line_is_raised_as_the_class_that_it_was(cls: type[OrchestratorError]) -> None:
    said = {"event": "error", "error": cls.__name__, "message": "m", "advice": "a", "exit_code": cls.exit_code}
    word = decode_line(json.dumps(said))
    assert isinstance(word, Errored)
    with pytest.raises(cls) as caught:
        conclude(word, stopped=False, where="build-x")
    assert (type(caught.value), caught.value.message, caught.value.advice) == (cls, "m", "a")
    assert caught.value.exit_code == cls.exit_code


def test_last_error_line_of_an_unknown_class_keeps_its_exit_code() -> None:
    with pytest.raises(OrchestratorError, match="NovelError: m") as caught:
        conclude(Errored(error="NovelError", message="m", advice="a", exit_code=99), stopped=False, where="build-x")
    assert caught.value.exit_code == 99


def test_conclude_without_a_last_word_tells_stopped_from_lost() -> None:
    with pytest.raises(TerminatedError, match="build-x was stopped"):
        conclude(None, stopped=True, where="build-x")
    with pytest.raises(DriverLostError, match="build-x ended without a result: out of memory"):
        conclude(None, stopped=False, where="build-x", reason="out of memory")


def test_tail_holds_what_is_no_event() -> None:
    reader = LogReader()
    reader.feed('{"event": "finish", "ran": []}\nTraceback (most recent call last):\nModuleNotFoundError: orchestrator')
    assert reader.tail == "Traceback (most recent call last):\nModuleNotFoundError: orchestrator"
