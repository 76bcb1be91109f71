"""A driver's JSON lines, read back: what JsonListener and the command line print becomes events, a result, or the error again."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import DriverLostError, OrchestratorError, TerminatedError, error_classes
from orchestrator.events.builds import (
    BuildEvent,
    Errored,
    Finished,
    LogReader,
    Planned,
    Published,
    Retrying,
    Stepped,
    conclude,
    decode_line,
)
from orchestrator.events.steps import StepFailed, StepProgress, StepStarted, StepSucceeded
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.report import JsonListener
from orchestrator.run.driver import Result
from orchestrator.run.schedule import Start
from tests.conftest import SpecMaker
from tests.support.plans import LOST, outcome_of
from tests.support.synthetic import model_config, random_arrays, write_source

PUBLISHED = {"event": "published", "manifest": "s3://b/releases/tiny/1/manifest.json", "steps_run": 3, "verification": None}


@pytest.fixture
def plan(tmp_path: Path, make_spec: SpecMaker) -> Plan:
    config = model_config()
    return preparation.plan(make_spec(write_source(tmp_path / "source", config, random_arrays(config))))


@pytest.fixture
def log(plan: Plan) -> str:
    """What a driver prints of a build with a lost and a repeated step, among lines of others."""
    stream = io.StringIO()
    listener = JsonListener(stream)
    first, *_ = plan.steps
    listener.on_plan(plan, {}, already_published=False)
    stream.write("2026-01-01 INFO a library speaks\n")
    listener.on_event(StepStarted(digest=first.digest, node="n1", attempt=1))
    listener.on_event(StepFailed(digest=first.digest, failure=LOST))
    listener.on_retry(Start(first, 2, 4.0))
    listener.on_event(StepProgress(digest=first.digest, phase="convert", done=1, total=2, unit="bytes"))
    listener.on_event(StepSucceeded(digest=first.digest, outcome=outcome_of(first)))
    stream.write('{"event": "of a newer driver"}\n{"not": "ours"}\n[1]\n{broken\n')
    listener.on_finish(plan, Result({}, frozenset({first.digest})))
    return stream.getvalue() + json.dumps(PUBLISHED) + "\n"


def test_log_of_a_build_becomes_its_events_in_order(plan: Plan, log: str) -> None:
    reader = LogReader()
    name, digest = plan.steps[0].name, plan.steps[0].digest
    planned, *others = reader.feed(log)
    assert isinstance(planned, Planned)
    assert (planned.num_steps, planned.build_key) == (len(plan.steps), plan.build_key)
    assert planned.pending == tuple(step.name for step in plan.steps)
    assert others == [
        Stepped(name, StepStarted(digest=digest, node="n1", attempt=1)),
        Stepped(name, StepFailed(digest=digest, failure=LOST)),
        Retrying(name, digest, 2, 4.0),
        Stepped(name, StepProgress(digest=digest, phase="convert", done=1, total=2, unit="bytes")),
        Stepped(name, StepSucceeded(digest=digest, outcome=outcome_of(plan.steps[0]))),
        Finished((name,)),
        Published(PUBLISHED["manifest"], 3, None),
    ]
    assert reader.last_word == others[-1]


LINES = [
    '{"event": "finish", "ran": ["convert/é"]}',
    "a library speaks",
    '{"event": "retry", "digest": "d", "attempt": 2, "delay_seconds": 1.5}',
    "",
    json.dumps(PUBLISHED),
]


@given(st.data())
def test_log_cut_anywhere_gives_every_event_once(data: st.DataObject) -> None:
    text = "\n".join(LINES) + "\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    whole = LogReader().feed(text)
    in_pieces, growing = LogReader(), LogReader()
    pieces: list[BuildEvent] = []
    grown: list[BuildEvent] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += in_pieces.feed(text[begin:end])
        grown += growing.feed_whole(text[:end])
    assert pieces == grown == whole
    assert len(whole) == 3


def test_log_that_shrinks_tells_nothing_twice() -> None:
    reader = LogReader()
    text = "\n".join(LINES) + "\n"
    assert len(reader.feed_whole(text)) == 3
    assert reader.feed_whole(text[:10]) == []
    assert reader.feed_whole(text) == []


def test_log_without_a_last_newline_is_read_when_closed() -> None:
    reader = LogReader()
    assert reader.feed(json.dumps(PUBLISHED)) == []
    assert [type(event) for event in reader.close()] == [Published]
    assert reader.close() == []


@pytest.mark.parametrize("line", ["", "{}", '{"event": 1}', '{"event": "error"}', '{"event": "started", "digest": 3}', "null"])
def test_line_that_is_no_event_is_passed_over(line: str) -> None:
    assert decode_line(line) is None


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
        conclude(Errored("NovelError", "m", "a", 99), stopped=False, where="build-x")
    assert caught.value.exit_code == 99


def test_conclude_without_a_last_word_tells_stopped_from_lost() -> None:
    with pytest.raises(TerminatedError, match="build-x was stopped"):
        conclude(None, stopped=True, where="build-x")
    with pytest.raises(DriverLostError, match="build-x ended without a last word: out of memory"):
        conclude(None, stopped=False, where="build-x", reason="out of memory")


def test_tail_holds_what_is_no_event() -> None:
    reader = LogReader()
    reader.feed('{"event": "finish", "ran": []}\nTraceback (most recent call last):\nModuleNotFoundError: orchestrator')
    assert reader.tail == "Traceback (most recent call last):\nModuleNotFoundError: orchestrator"
