"""What the command line prints when something goes wrong: short, without control characters, without a traceback unless asked."""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner, Result

from orchestrator.base.errors import MESSAGE_BYTES, OrchestratorError, SpecError, abbreviated, bounded
from orchestrator.cli.commands import app
from orchestrator.planning import preparation


def plan(tmp_path: Path, *words: str) -> Result:
    (tmp_path / "spec.yaml").write_text("source: {path: model}\nrelease: {name: a, version: '1'}\n")
    return CliRunner().invoke(app, ["plan", str(tmp_path / "spec.yaml"), *words])


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(preparation, "plan", fail)


def test_a_bug_is_one_line_that_says_where_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyError("x"))
    result = plan(tmp_path)
    assert result.exit_code == OrchestratorError.exit_code == 1
    shown = " ".join(result.stderr.split())
    assert "error: a bug of this program: KeyError: 'x' (test_cli_errors.py, line" in shown
    assert "with -v" in shown
    assert "Traceback" not in result.output


def test_a_bug_with_verbose_prints_the_traceback_wherever_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyError("x"))
    for words in (["plan", str(tmp_path / "spec.yaml"), "-v"], ["--verbose", "plan", str(tmp_path / "spec.yaml")]):
        plan(tmp_path)
        result = CliRunner().invoke(app, words)
        assert "Traceback (most recent call last)" in result.stderr
        assert "KeyError: 'x'" in result.stderr
    assert "Traceback" not in plan(tmp_path).stderr


def test_a_bug_as_json_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyError("x"))
    found = json.loads(plan(tmp_path, "--json").stdout)
    assert (found["error"], found["exit_code"]) == ("KeyError", 1)


@pytest.mark.parametrize("words", [[], ["--json"]])
@pytest.mark.parametrize("text", ["x" * 10_000_000, "\U0001f600" * 100_000, "[" * 100_000, "\x1b[31m" * 10**5, "\ud800" * 10**5])
def test_an_error_of_any_size_is_printed_in_4_kilobytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    raising(monkeypatch, SpecError(f"begin {text} end", text))
    result = plan(tmp_path, *words)
    assert result.exit_code == SpecError.exit_code
    assert 0 < len((result.stdout + result.stderr).encode()) <= 4096
    assert "begin" in result.output
    assert "\x1b" not in result.output


def test_a_bug_of_any_size_is_printed_in_4_kilobytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyError("x" * 10_000_000))
    assert len(plan(tmp_path).stderr.encode()) <= 4096


def test_bounded_keeps_beginning_and_end() -> None:
    made = bounded("begin " + "é" * 5000 + " end", MESSAGE_BYTES)
    assert made.startswith("begin ")
    assert made.endswith(" end")
    assert MESSAGE_BYTES - 100 < len(made.encode()) <= MESSAGE_BYTES
    assert "characters" in made
    assert bounded("short", 5) == "short"
    assert abbreviated("a" * 100, 40) == "a" * 12 + "...(100 characters)..." + "a" * 6


def test_an_error_of_the_python_api_prints_its_advice_in_tracebacks_also_after_a_pickle() -> None:
    for error in (SpecError("wrong", "do this"), pickle.loads(pickle.dumps(SpecError("wrong", "do this")))):
        assert "".join(traceback.format_exception_only(error)).splitlines() == [
            "orchestrator.base.errors.SpecError: wrong",
            "do this",
        ]
    assert str(SpecError("wrong", "do this")) == "wrong"


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["plan", "-h"], ["checkpoint", "compare", "-h"], ["k8s", "submit", "-h"]])
def test_help_is_printed_by_h_everywhere(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "--help" in result.output


def test_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"orchestrator {importlib.metadata.version('trt-orchestrator')}")


def test_a_name_that_is_no_text_is_printed(tmp_path: Path) -> None:
    from tests.support.synthetic import model_config, random_arrays, write_source

    config = model_config()
    source = write_source(tmp_path / "model", config, random_arrays(config))
    (source / "\udcff.safetensors").touch()
    done = subprocess.run([sys.executable, "-m", "orchestrator.cli", "inspect", str(source)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\udcff.safetensors" in done.stdout
