"""Floors and circles of imports (pyproject.toml, [tool.importlinter]), and what the command line imports at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.synthetic import model_config, random_arrays, write_source

ROOT = Path(__file__).resolve().parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", str(ROOT / "pyproject.toml")]
    return subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("importer", "line", "broken"),
    [
        ("planning/plan.py", "from orchestrator.work import context", "floors"),
        ("stores/file.py", "def f():\n    from orchestrator.work.context import Context", "floors"),
        ("stores/store.py", "def f():\n    from orchestrator.stores import file", "circle"),
        ("model/topology.py", "def f():\n    from orchestrator.model import weight_map", "circle"),
        ("clusters/local.py", "def f():\n    import ray", "Ray"),
        ("planning/plan.py", "def f():\n    import torch", "framework"),
    ],
)
def test_lint_imports_forbidden_import_is_found(tmp_path: Path, importer: str, line: str, broken: str) -> None:
    for package in ("orchestrator", "actors"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "orchestrator" / importer
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout
    assert any(broken in name and "BROKEN" in name for name in done.stdout.splitlines())


_PROBE = """
import json, sys
import orchestrator
from orchestrator.cli.commands import app
app(["plan", sys.argv[1], "--json"], standalone_mode=False)
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]), file=sys.stderr)
"""


def test_plan_on_the_command_line_imports_nothing_heavy(tmp_path: Path) -> None:
    config = model_config()
    source = write_source(tmp_path / "source", config, random_arrays(config))
    spec = tmp_path / "spec.yaml"
    plain = {
        "source": {"path": str(source)},
        "engine": {"max_input_len": 16, "max_seq_len": 64},
        "release": {"name": "tiny", "version": "1"},
    }
    spec.write_text(yaml.safe_dump(plain))
    heavy = ["ray", "torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "modelopt", "s3fs"]
    done = subprocess.run([sys.executable, "-c", _PROBE, str(spec), *heavy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert/stage0/group0" in [step["name"] for step in json.loads(done.stdout)["steps"]]
    assert json.loads(done.stderr.splitlines()[-1]) == []
