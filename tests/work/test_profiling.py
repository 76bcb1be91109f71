"""Steps under Nsight Systems, NVTX ranges, and logs whose lines say where they come from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base.errors import ToolError
from orchestrator.clusters.local import LocalCluster
from orchestrator.events import silent
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Task
from orchestrator.scheduling.driver import Result, drive
from orchestrator.spec.cluster import ClusterSpec, ProfileSpec
from orchestrator.stores import open_store
from orchestrator.work.logs import StepLog
from orchestrator.work.nvtx import Ranges
from tests.support.releases import release_spec, tiny_source

NSYS = """#!/bin/sh
# What nsys does, as far as a step can tell: speaks on stdout, runs the program, writes the trace at the end.
echo "$@" >> "$NSYS_CALLS"
echo "Collecting data..."
for word in "$@"; do case "$word" in --output=*) trace="${word#--output=}";; esac; done
while [ "${1##*/}" != python ] && [ "${1##*/}" != python3 ]; do shift; done
"$@"
code=$?
echo a trace > "$trace"
echo "Generated: $trace"
exit $code
"""


@pytest.fixture
def conversion(tmp_path: Path) -> Plan:
    made = preparation.plan(release_spec(tiny_source(tmp_path / "source")))
    return Plan(made.spec, made.inputs, tuple(made.of_kind(Kind.CONVERT))[:1])


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nsys").write_text(NSYS)
    (folder / "nsys").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NSYS_CALLS", str(tmp_path / "calls"))
    yield tmp_path / "calls"  # noqa: PT022


def run(plan: Plan, place: ClusterSpec) -> Result:
    cluster = LocalCluster(place)
    try:
        return drive(plan, {}, cluster, place, silent)
    finally:
        cluster.close()


def test_step_under_nsys_succeeds_and_its_trace_is_in_the_store(conversion: Plan, calls: Path, store_url: str) -> None:
    place = ClusterSpec(store=store_url, profile=ProfileSpec(steps=("convert",), nsys=("--trace=nvtx", "--sample=none")))
    result = run(conversion, place)
    assert result.failures == {}
    (outcome,) = result.outcomes.values()
    assert open_store(store_url).get(outcome.facts.profile) == b"a trace\n"
    assert "profile --force-overwrite=true" in calls.read_text()
    assert "--trace=nvtx --sample=none" in calls.read_text()


def test_step_of_another_kind_runs_without_nsys(conversion: Plan, calls: Path, store_url: str) -> None:
    result = run(conversion, ClusterSpec(store=store_url, profile=ProfileSpec(steps=("build",))))
    assert result.failures == {}
    assert not calls.exists()


def test_step_where_nsys_is_missing_fails_with_advice(
    conversion: Plan, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run(conversion, ClusterSpec(store=store_url, profile=ProfileSpec(steps=("convert",))))
    with pytest.raises(ToolError, match="no nsys on"):
        result.raise_failures(conversion)


class Recorder:
    def __init__(self) -> None:
        self.said: list[str] = []

    def start_range(self, message: str) -> str:
        self.said.append(f"+{message}")
        return message

    def end_range(self, range_id: Any) -> None:
        self.said.append(f"-{range_id}")


def test_ranges_nest_phases_in_the_step() -> None:
    marker = Recorder()
    with Ranges("build/rank0", (marker.start_range, marker.end_range)) as ranges:
        for phase in ("parse", "parse", "tactics"):
            ranges.phase(phase)
    assert marker.said == ["+build/rank0", "+parse", "-parse", "+tactics", "-tactics", "-build/rank0"]


def test_log_in_json_says_where_each_line_comes_from(conversion: Plan) -> None:
    step = conversion.steps[0].model_copy(update={"name": "build/rank3", "kind": Kind.BUILD})
    task = Task(step=step, inputs={}, attempt=2, store="memory://x", log_format="json")
    with StepLog(task, "node-7", lambda: 0.0) as log:
        log.write("parsed [it]")
        logging.getLogger("a.library").warning("mind %s", "the gap")
    logging.getLogger("a.library").warning("too late")
    first, second = (json.loads(line) for line in log.lines)
    where = {"step": "build/rank3", "kind": "build", "rank": 3, "stage": None, "attempt": 2, "node": "node-7"}
    assert first == {"time": "1970-01-01T00:00:00.000+00:00", "level": "info", **where, "message": "parsed [it]"}
    assert second == {**first, "level": "warning", "logger": "a.library", "message": "mind the gap"}


def test_log_as_text_is_what_was_said(conversion: Plan) -> None:
    log = StepLog(Task(step=conversion.steps[0], inputs={}, attempt=1, store="memory://x"), "n")
    log.write("parsed")
    assert log.lines == ["parsed"]
