"""`orchestrator plan --simulate` and `orchestrator rates`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from orchestrator.base import errors
from orchestrator.cli.commands import app
from orchestrator.planning.preparation import plan as make_plan
from orchestrator.planning.steps import Kind
from orchestrator.spec.decoding import decode
from orchestrator.spec.loading import load_spec
from orchestrator.spec.rates import RatesSpec
from tests.integration.steps import run_steps


class Workplace:
    """A spec, a cluster of two pools and their rates, as files."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self.write("spec", {
            "source": {"path": str(source)}, "topology": {"tp": 2, "pp": 2},
            "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}, "release": {"name": "tiny", "version": "1"},
        })  # fmt: skip
        self.write("cluster", {
            "store": "store", "retries": {"backoff_seconds": 7},
            "pools": {
                "builders": {"nodes": 2, "cpus": 1, "memory": "8GB", "steps": ["build"]},
                "rest": {"cpus": 4, "memory": "64GB"},
            },
        })  # fmt: skip
        self.write("rates", {"store_read": "1MB", "pools": {"builders": {"price_per_hour": 3600}}})

    def write(self, name: str, plain: dict[str, Any]) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(plain))

    def simulate(self, *words: str, files: bool = True) -> Result:
        given = ["--cluster", str(self.folder / "cluster.yaml"), "--rates", str(self.folder / "rates.yaml")] if files else []
        return CliRunner().invoke(app, ["plan", str(self.folder / "spec.yaml"), "--simulate", *given, *words])


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama: Path) -> Workplace:
    return Workplace(tmp_path, tiny_llama)


def test_simulate_json_holds_every_attempt_and_adds_up(workplace: Workplace) -> None:
    found = json.loads(workplace.simulate("--json", "--fail", "build/rank3:1").stdout)
    spans = found["spans"]
    assert sorted(span["name"] for span in spans if span["failed"]) == ["build/rank3"]
    assert found["retries"] == 1
    assert found["failures"] == {}
    assert {span["node"] for span in spans if span["kind"] == "build"} == {"builders/0", "builders/1"}
    assert found["makespan_seconds"] == max(span["end"] for span in spans) >= found["critical_seconds"]
    assert found["cost"] == pytest.approx(2 * found["makespan_seconds"])
    assert found["links"]["store/read"]["num_bytes"] == sum(pool["read_bytes"] for pool in found["pools"].values())
    first, second = (span for span in spans if span["name"] == "build/rank3")
    assert second["start"] >= first["end"] + 7


def test_simulate_says_it_in_words(workplace: Workplace) -> None:
    done = workplace.simulate("--fail", "convert/stage0/group0:1:application")
    assert done.exit_code == 0, done.output
    assert "makespan" in done.stdout
    assert "the critical path alone takes" in done.stdout
    assert "builders" in done.stdout
    assert "the build would fail: convert/stage0/group0: failed as scripted" in done.stdout
    assert "note:" not in done.stdout


def test_simulate_without_files_says_what_it_takes_for_granted(workplace: Workplace) -> None:
    done = workplace.simulate(files=False)
    assert done.exit_code == 0, done.output
    assert "CPUs or memory of default are not in the cluster file" in done.stdout


def test_simulate_of_a_step_that_is_not_there_is_refused(workplace: Workplace) -> None:
    done = workplace.simulate("--fail", "build/rank9:1")
    assert done.exit_code == errors.SpecError.exit_code
    assert "the plan has no step 'build/rank9'" in done.output


def test_simulate_of_a_failure_that_is_none_is_said_letter_by_letter(workplace: Workplace) -> None:
    done = workplace.simulate("--fail", "build/rank0:x")
    assert done.exit_code == errors.SpecError.exit_code
    assert "--fail build/rank0:x: expected STEP:ATTEMPT" in done.output


def test_simulation_options_without_simulate_are_refused(workplace: Workplace) -> None:
    words = ["plan", str(workplace.folder / "spec.yaml"), "--fail", "build/rank0:1"]
    assert CliRunner().invoke(app, words).exit_code == errors.SpecError.exit_code


def test_rates_of_finished_steps_can_be_simulated_with(workplace: Workplace) -> None:
    spec, store = workplace.folder / "spec.yaml", workplace.folder / "store"
    words = ["rates", str(spec), "--store", str(store)]
    assert CliRunner().invoke(app, words).exit_code == errors.SpecError.exit_code, "nothing was built yet"
    run_steps(make_plan(load_spec(spec)), store.as_uri(), {Kind.CONVERT})
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("# 2 of 10 steps of ")
    found = yaml.safe_load(done.stdout)
    assert list(decode(RatesSpec, found, "printed").steps) == ["convert"]
    workplace.write("rates", found)
    assert workplace.simulate().exit_code == 0
