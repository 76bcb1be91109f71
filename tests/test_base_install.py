"""The base install serves the laptop and the serving node; a command whose extra is missing names it and does nothing.

Everything that `pip install trt-orchestrator` would not bring is blocked in a process of its own; `python -m
benchmarks.base_install` does the same in a real environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.base_install import problem, refused, served, write_files
from orchestrator.base.errors import ToolError
from orchestrator.base.extras import EXTRAS, missing_extra, require
from orchestrator.work.failures import failure_of
from tests.support.releases import publish_tiny

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_OURS = {"orchestrator", "actors", "tests", "benchmarks"}

_PROBE = """
import importlib.abc, json, sys

blocked = set(json.loads(sys.argv[1]))

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Blocked())
from typer.testing import CliRunner
from orchestrator.cli.commands import app

for line in sys.stdin:
    done = CliRunner().invoke(app, json.loads(line))
    print(json.dumps([done.exit_code, done.output]))
"""


def beyond_base() -> set[str]:
    """Top-level modules of this environment that the base install does not bring."""
    found: set[str] = set()
    pending = [Requirement(text) for text in PROJECT["dependencies"]]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        pending.extend(Requirement(text) for text in importlib.metadata.requires(name) or [])
    modules = importlib.metadata.packages_distributions()
    kept = {module for module, names in modules.items() if {canonicalize_name(name) for name in names} & found}
    return set(modules) - kept - _OURS


def test_base_install_serves_laptop_and_serving_node_and_names_missing_extras(tmp_path: Path) -> None:
    published = publish_tiny(tmp_path)
    write_files(tmp_path, tmp_path / "source")
    (tmp_path / "source").rename(tmp_path / "model")
    write_files(tmp_path, tmp_path / "model")
    cases = [*served(tmp_path, published.url), *refused(tmp_path, published.url)]
    blocked = beyond_base()
    assert {"torch", "numpy", "ray", "onnx", "kubernetes", "jinja2"} <= blocked
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(sorted(blocked))],
        input="".join(json.dumps(case.words) + "\n" for case in cases),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [
        f"{' '.join(case.words)}: {said}: {output[-300:]}"
        for case, (code, output) in zip(cases, ended, strict=True)
        if (said := problem(case, code, output))
    ]
    assert wrong == []
    assert not (tmp_path / "new").exists()


def test_extras_are_those_of_pyproject_and_hold_their_modules() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev"}
    modules = importlib.metadata.packages_distributions()
    for extra, names in EXTRAS.items():
        distributions = [canonicalize_name(Requirement(text).name) for text in extras[extra]]
        for module in set(names) & set(modules) - {"cryptography"}:  # cryptography comes with pyOpenSSL
            assert any(canonicalize_name(name).startswith(tuple(distributions)) for name in modules[module]), module


def test_every_extra_that_needs_no_gpu_is_in_dev() -> None:
    (own,) = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"] if text.startswith("trt-orchestrator[")]
    assert own.extras == set(EXTRAS) - {"tensorrt", "gpu"}


def test_require_names_every_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "build", ("json", "no_such_module"))
    monkeypatch.setitem(EXTRAS, "ray", ("no_such_ray",))
    with pytest.raises(ToolError) as caught:
        require("build", "mpi", "ray")
    assert caught.value.message == "this needs the extra build,ray: no_such_module, no_such_ray is not installed"
    assert caught.value.advice == "Run: pip install 'trt-orchestrator[build,ray]'"


def test_missing_extra_explains_only_modules_of_extras_that_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "build", ("json", "no_such_module"))
    assert missing_extra(ModuleNotFoundError("x", name="json.nothing")) is None
    assert missing_extra(ModuleNotFoundError("x", name="another_module")) is None
    assert missing_extra(ImportError("x", name="no_such_module")) is None
    found = missing_extra(ModuleNotFoundError("x", name="no_such_module.part"))
    assert found is not None
    assert "trt-orchestrator[build]" in found.advice


def test_step_on_a_node_without_its_extra_fails_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "build", ("no_such_module",))
    failure = failure_of(ModuleNotFoundError("x", name="no_such_module"), "node", "", "")
    error = failure.to_error("convert/stage0/group0")
    assert isinstance(error, ToolError)
    assert "trt-orchestrator[build]" in error.advice


@pytest.mark.parametrize(("words", "expected"), [("orchestrator pla", "plan"), ("orchestrator pull --no-c", "--no-check")])
def test_completion_offers_commands_and_options(words: str, expected: str) -> None:
    variables = {"_ORCHESTRATOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = _program(variables)
    assert done.stdout.split() == [expected]


def test_completion_script_is_printed_for_every_shell() -> None:
    for shell, text in (("bash", "complete -o default -F"), ("zsh", "#compdef orchestrator"), ("fish", "complete --command")):
        done = _program({"_ORCHESTRATOR_COMPLETE": f"source_{shell}"})
        assert text in done.stdout, (shell, done.stdout, done.stderr)


def test_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"orchestrator \d+\.\d+\.\d+\n", _program({}, "--version").stdout)


def _program(variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("orchestrator")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([str(program), *words], capture_output=True, text=True, check=False, env=environment)
