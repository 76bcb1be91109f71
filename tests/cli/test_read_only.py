"""Commands that write, where this user may not: an error that says so before any work, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.base.errors import ManifestError, SpecError, StoreError
from orchestrator.cli.commands import app
from tests.support.ordinary_user import ordinary_user
from tests.support.synthetic import model_config, random_arrays, write_source

SPEC = """
source: {path: model}
engine: {max_batch_size: 2, max_input_len: 16, max_seq_len: 64}
release: {name: tiny, version: "1"}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec, its source, a converted checkpoint, and a store and an output that nobody may write to."""
    folder = tmp_path_factory.mktemp("place")
    config = model_config()
    write_source(folder / "model", config, random_arrays(config))
    (folder / "spec.yaml").write_text(SPEC)
    made = CliRunner().invoke(app, ["convert", "--source", str(folder / "model"), "--output", str(folder / "checkpoint")])
    assert made.exit_code == 0, made.output
    for name in ("store", "output"):
        (folder / name).mkdir(mode=0o555)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "build spec.yaml --store store",
        "build spec.yaml --store store/new",
        "build spec.yaml --store other --report output/report.html",
        "collect store",
        "convert --source model --output output",
        "convert --source model --output output/new",
        "build-engine --checkpoint checkpoint --max-input-len 16 --output output",
        "build-engine --checkpoint checkpoint --max-input-len 16 --output output/new",
        "quantize spec.yaml --store store --sweep none",
    ],
)
def test_command_that_writes_where_it_may_not_says_so(place: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(place)
    with ordinary_user():
        result = CliRunner().invoke(app, words.split())
    assert result.exit_code == StoreError.exit_code, result.output
    shown = " ".join(result.output.split())
    assert "cannot write" in shown
    assert "Permission denied" in shown
    assert "Give this user the right to read and write there, or name another place." in shown
    assert not list((place / "store").iterdir()) + list((place / "output").iterdir())
    assert not (place / "other").exists()


@pytest.mark.parametrize("days", ["inf", "1e300", "36501"])
def test_collect_with_an_impossible_number_of_days_is_refused(place: Path, days: str) -> None:
    result = CliRunner().invoke(app, ["collect", str(place / "store"), "--grace-days", days])
    assert result.exit_code == SpecError.exit_code
    assert "Give a number of days from 0 to 36,500" in " ".join(result.output.split())


@pytest.mark.parametrize("days", ["nan", "-1", "x"])
def test_collect_with_no_number_of_days_is_wrong_usage(place: Path, days: str) -> None:
    assert CliRunner().invoke(app, ["collect", str(place / "store"), "--grace-days", days]).exit_code == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "holds no manifests"),
        (b"\xff", "is not UTF-8"),
        (b"a: " + b"[" * 5000, "is not YAML"),
        (b"a: !!int abc", "is not YAML"),
        (b"a: " + b"9" * 5000, "is not YAML"),
        (b"- 1", "not a Kubernetes object"),
    ],
)
def test_validate_of_what_holds_no_manifests_is_an_error(tmp_path: Path, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / "a.yaml").write_bytes(data)
    result = CliRunner().invoke(app, ["k8s", "validate", str(tmp_path)])
    assert result.exit_code == ManifestError.exit_code
    assert words in " ".join(result.output.split())
