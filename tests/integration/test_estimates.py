"""Peaks of memory of every step, each in a process of its own, stay below the plan's estimates and above half of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from tests.support.peaks import measure
from tests.support.synthetic import build_spec, model_config, random_arrays, write_source

ENGINE = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}
WIDE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "head_size": 128,
    "num_hidden_layers": 2, "vocab_size": 16000,
}  # fmt: skip
DEEP = {
    **WIDE,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 24,
    "vocab_size": 4000,
}
PORTABLE = {"name": "tiny", "version": "1", "include": ["engines", "portable"]}
ANY = {"tolerance": {"max_relative_error": None, "max_mean_kl": 100.0, "min_top1_agreement": 0.0}}
"""Random weights say nothing of what a quantization costs."""


def plan_of(folder: Path, config: dict[str, Any], **spec: Any) -> Plan:
    made = model_config(**config)
    small = {name: np.multiply(array, 0.05).astype(array.dtype) for name, array in random_arrays(made).items()}
    return preparation.plan(build_spec(write_source(folder, made, small), engine=ENGINE, **spec))


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (WIDE, {"topology": {"tp": 2}, "release": PORTABLE}),
        (WIDE, {"quantization": {"algorithm": "FP8"}, "verification": ANY}),
        (DEEP, {"topology": {"pp": 2}, "release": PORTABLE}),
    ],
    ids=["wide-tp2", "wide-fp8", "deep-pp2"],
)
def test_estimates_of_every_step_are_above_its_peak_and_at_most_twice_it(
    tmp_path: Path, config: dict[str, Any], spec: dict[str, Any]
) -> None:
    found = measure(plan_of(tmp_path / "model", config, **spec), (tmp_path / "store").as_uri())
    peaks = {each.step.name: (each.peak_bytes, each.step.resources.memory_bytes) for each in found}
    assert {name: pair for name, pair in peaks.items() if not pair[0] <= pair[1] <= 2 * pair[0]} == {}


def test_estimates_of_reference_and_verification_do_not_grow_with_layers(tmp_path: Path) -> None:
    sizes = {
        layers: {
            step.kind.value: step.resources.memory_bytes
            for step in plan_of(tmp_path / f"{layers}", {**DEEP, "num_hidden_layers": layers}, release=PORTABLE).steps
        }
        for layers in (2, 12)
    }
    assert sizes[2]["reference"] == sizes[12]["reference"]
    assert sizes[2]["verify"] == sizes[12]["verify"]
    assert sizes[2]["export"] == sizes[12]["export"]
    assert sizes[2]["build"] < sizes[12]["build"]
