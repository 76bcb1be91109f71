"""Files that people write, read from wherever they stand."""

from __future__ import annotations

from pathlib import Path

from orchestrator.loading import load_spec

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
