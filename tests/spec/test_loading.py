"""Files that people write, read from wherever they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.base.errors import SpecError
from orchestrator.spec.loading import load_cluster, load_rates, load_spec

SPEC = """
source: {path: model}
quantization:
  algorithm: MIXED_PRECISION
  quant_cfg: mixture.json
  scales: s3://bucket/scales
  calibration: {dataset: chats.jsonl}
release: {name: a, version: "1"}
"""


def test_load_spec_counts_relative_files_from_the_spec_and_leaves_urls_alone(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    spec = load_spec(tmp_path / "spec.yaml")
    asked = spec.quantization
    assert asked is not None
    assert (spec.source.path, asked.quant_cfg) == (str(tmp_path / "model"), str(tmp_path / "mixture.json"))
    assert (asked.scales, asked.calibration.dataset) == ("s3://bucket/scales", str(tmp_path / "chats.jsonl"))


def test_load_spec_leaves_the_name_of_a_dataset_alone(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC.replace("chats.jsonl", "cnn_dailymail"))
    asked = load_spec(tmp_path / "spec.yaml").quantization
    assert asked is not None
    assert asked.calibration.dataset == "cnn_dailymail"


@pytest.mark.parametrize("load", [load_spec, load_cluster, load_rates])
@pytest.mark.parametrize("data", [b"\xff", b"a: !!int abc", b"a: " + b"[" * 100_000, b"a: " + b"9" * 5000, b"a: 1\0"])
def test_load_of_what_is_not_yaml_is_a_spec_error_with_the_line(tmp_path: Path, load: object, data: bytes) -> None:
    (tmp_path / "file.yaml").write_bytes(data)
    assert callable(load)
    with pytest.raises(SpecError, match="line 1"):
        load(tmp_path / "file.yaml")


@pytest.mark.parametrize("name", ["missing.yaml", ".", "file.yaml/x", "x\0y", "x" * 300])
def test_load_of_what_cannot_be_read_says_why(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.yaml").touch()
    with pytest.raises(SpecError, match="cannot read") as caught:
        load_spec(tmp_path / name)
    assert caught.value.advice == "Check the path."


def test_load_of_an_endless_file_stops(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").symlink_to("/dev/zero")
    with pytest.raises(SpecError, match="more than 262,144 bytes"):
        load_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize("path", ['"a\\0b"', "~nobody-of-this-name/x", "loop/x"])
def test_load_spec_of_a_source_that_no_path_can_be_says_so(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "spec.yaml").write_text(f"source: {{path: {path}}}\nrelease: {{name: a, version: '1'}}\n")
    with pytest.raises(SpecError, match="is no path of this machine"):
        load_spec(tmp_path / "spec.yaml")
