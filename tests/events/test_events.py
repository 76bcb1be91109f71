"""Events as lines of JSON: the format that users, RayJobs and stores of earlier builds have, line for line."""

from __future__ import annotations

import json

import pytest

from orchestrator.base.errors import StoreError
from orchestrator.events import (
    Errored,
    Event,
    Published,
    StepsFinished,
    StepStarted,
    decode_line,
    encode_line,
    print_line,
    to_all,
)
from tests.support.plans import fake_plan, outcome_of

# ruff: noqa: E501
LINES = r"""
{"event": "plan", "time": "2026-01-01T00:00:00.500+00:00", "pending": ["convert/stage0/group1", "build/rank1"], "build_key": "key", "already_published": false, "warnings": ["w"], "notes": ["note"], "estimates": [1.5, 2.0], "release": "tiny/1", "steps": 3}
{"event": "nodes", "time": "2026-01-01T00:00:00.500+00:00", "nodes": [{"node": "n1", "node_id": "", "address": "", "labels": {}, "cpus": 2.0, "gpus": 0.0, "memory_bytes": 0, "devices": [], "driver": "", "scratch": "", "scratch_free_bytes": 0, "store_error": "", "store_seconds": 0.0, "paths": {}, "versions": {}, "error": ""}], "warnings": ["w"]}
{"event": "started", "time": "2026-01-01T00:00:00.500+00:00", "step": "convert/stage0/group1", "node": "n1", "attempt": 1, "kind": "convert", "rank": null, "stage": 0, "digest": "d", "at": "2026-01-01T00:00:00Z"}
{"event": "progress", "time": "2026-01-01T00:00:00.500+00:00", "step": "convert/stage0/group1", "node": "n1", "attempt": 1, "kind": "convert", "rank": null, "stage": 0, "digest": "d", "phase": "convert", "done": 1, "total": 2, "unit": "bytes"}
{"event": "succeeded", "time": "2026-01-01T00:00:00.500+00:00", "step": "convert/stage0/group1", "node": "n1", "attempt": 1, "kind": "convert", "rank": null, "stage": 0, "digest": "d", "outcome": {"digest": "d", "name": "convert/stage0/group1", "kind": "convert", "outputs": [], "consumed": [], "facts": {"peak_memory_bytes": 0, "profile": ""}, "node": "n1", "started_at": "", "seconds": 1.5, "tools": {}, "usage": null, "log": "", "log_tail": ""}}
{"event": "failed", "time": "2026-01-01T00:00:00.500+00:00", "step": "build/rank1", "node": "n1", "attempt": 1, "kind": "build", "rank": 1, "stage": null, "digest": "e", "failure": {"kind": "infrastructure", "message": "node lost", "error": "", "advice": "", "cause": "node", "damaged": "", "node": "", "rank": null, "attempt": 0, "log_tail": "", "traceback": "", "worker_log": "", "kernel": ""}}
{"event": "retry", "time": "2026-01-01T00:00:00.500+00:00", "step": "build/rank1", "digest": "e", "attempt": 2, "delay_seconds": 4.0, "kind": "build", "rank": 1, "stage": null}
{"event": "finish", "time": "2026-01-01T00:00:00.500+00:00", "ran": ["convert/stage0/group1"]}
{"event": "alive", "time": "2026-01-01T00:00:00.500+00:00"}
{"event": "published", "time": "2026-01-01T00:00:00.500+00:00", "manifest": "s3://b/releases/tiny/1/manifest.json", "steps_run": 3, "verification": {"num_positions": 4}}
{"event": "error", "time": "2026-01-01T00:00:00.500+00:00", "error": "StoreError", "message": "m", "advice": "a", "exit_code": 17}
"""


@pytest.mark.parametrize("line", LINES.strip().splitlines(), ids=lambda line: json.loads(line)["event"])
def test_line_is_decoded_and_encoded_to_the_same_fields(line: str) -> None:
    event = decode_line(line)
    assert event is not None
    again = encode_line(event)
    assert json.loads(again) == json.loads(line)
    assert again.startswith('{"event": "')
    assert "\n" not in again


@pytest.mark.parametrize(
    "line",
    [
        "", "{}", '{"event": 1}', '{"event": "error"}', '{"event": "started", "digest": 3}', "null", "[1]", "{broken",
        '{"event": "of a newer driver"}', '{"event": "alive", "time": "yesterday"}', " " + '{"event": "alive"}',
    ],
)  # fmt: skip
def test_line_that_is_no_event_is_passed_over(line: str) -> None:
    assert decode_line(line) is None


def test_fields_of_a_newer_driver_are_passed_over() -> None:
    event = decode_line('{"event": "started", "digest": "d", "step": "build/rank3", "node": "n", "attempt": 2, "mood": "good"}')
    assert isinstance(event, StepStarted)
    assert (event.kind, event.rank, event.stage, event.node, event.attempt) == ("build", 3, None, "n", 2)


def test_step_without_a_name_is_called_by_its_digest() -> None:
    event = decode_line('{"event": "retry", "digest": "d", "attempt": 2, "delay_seconds": 1.5}')
    assert event is not None
    assert json.loads(encode_line(event))["step"] == "d"


@pytest.mark.parametrize(
    ("name", "kind", "rank", "stage"),
    [
        ("convert/stage3/group1", "convert", None, 3), ("calibrate/max/part2", "calibrate", None, 2), ("build/rank11", "build", 11, None),
        ("miniature", "miniature", None, None), ("verify/stage0", "verify", None, 0),
    ],
)  # fmt: skip
def test_step_events_have_kind_rank_and_stage_of_their_step(name: str, kind: str, rank: int | None, stage: int | None) -> None:
    event = StepStarted(digest="d", step=name)
    assert (event.kind, event.rank, event.stage) == (kind, rank, stage)


def test_outcomes_of_the_end_are_for_this_process_alone() -> None:
    plan = fake_plan({"a": []})
    event = StepsFinished(ran=("a",), steps=((plan.steps[0], outcome_of(plan.steps[0])),), time=1e9)
    assert json.loads(encode_line(event)).keys() == {"event", "time", "ran"}
    assert decode_line(encode_line(event)) == event.model_copy(update={"steps": ()})


def test_error_that_names_a_file_whose_name_is_no_text_is_encoded() -> None:
    event = Errored.of(StoreError("no caf\udce9 here", "rename caf\udce9")).model_copy(update={"time": 1e9})
    assert json.loads(encode_line(event))["message"] == "no caf\\udce9 here"
    assert decode_line(encode_line(event)) == event


def test_listeners_hear_every_event_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[Event] = []
    listener = to_all(heard.append, print_line)
    told = [Published(manifest="m"), StepStarted(digest="d", node="n", attempt=1)]
    for event in told:
        listener(event)
    assert heard == told
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == ["published", "started"]
