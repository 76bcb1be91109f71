"""Comparison of checkpoints: identical, different by known amounts, and different in what they hold."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from orchestrator import stages
from orchestrator.base.errors import SourceMissingError
from orchestrator.checkpoints import compare as comparison
from orchestrator.checkpoints.compare import Difference, compare
from orchestrator.cli.commands import app
from tests.support.synthetic import Array, build_spec, model_config, random_arrays, write_source

CONFIG = model_config()
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def write(folder: Path, changes: dict[str, Array | None] | None = None, *, dtype: str = "BF16", num_files: int = 1) -> str:
    """A seeded checkpoint with some tensors put in or (None) left out."""
    arrays = {**random_arrays(CONFIG, dtype), **(changes or {})}
    return str(write_source(folder, CONFIG, {name: array for name, array in arrays.items() if array is not None}, num_files))


def changed(name: str, edit: Any) -> dict[str, Array | None]:
    array = random_arrays(CONFIG)[name].copy()
    edit(array)
    return {name: array}


def only_difference(a: str, b: str) -> Difference:
    (found,) = compare(a, b).differences
    return found


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["checkpoint", "compare", *words])


def test_compare_of_the_same_tensors_in_other_files_is_identical(tmp_path: Path) -> None:
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", num_files=3))
    arrays = random_arrays(CONFIG)
    assert found.same
    assert (found.num_identical, found.num_bytes) == (len(arrays), sum(array.nbytes for array in arrays.values()))
    assert list(found.lines()) == [
        f"identical: {len(arrays)} tensors bit-identical, 0 different, 0 only in A, 0 only in B; {found.num_bytes:,} bytes compared"
    ]


@pytest.mark.parametrize("block", [1, 64, 2**20])
def test_compare_measures_the_largest_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(comparison, "BLOCK_BYTES", block)
    array = np.full((37, 16), 2.0, ml_dtypes.bfloat16)
    other = array.copy()
    other[3, 4], other[36, 15], array[20, 0], other[20, 0] = 2.25, 1.0, -8, -8
    found = only_difference(write(tmp_path / "a", {HEAD: array}), write(tmp_path / "b", {HEAD: other}))
    assert found == Difference(HEAD, ("BF16", "BF16"), ((37, 16), (37, 16)), 2, 1.0, 0.125)


def test_compare_lists_what_only_one_has(tmp_path: Path) -> None:
    found = compare(write(tmp_path / "a", {NORM: None}), write(tmp_path / "b", {HEAD: None}))
    assert (found.only_a, found.only_b, found.differences, found.same) == ((HEAD,), (NORM,), (), False)
    assert list(found.lines())[:2] == [f"only in A: {HEAD}", f"only in B: {NORM}"]


def test_compare_of_other_shapes_reads_nothing_of_them(tmp_path: Path) -> None:
    array = np.zeros((16, 37), ml_dtypes.bfloat16)
    found = only_difference(write(tmp_path / "a"), write(tmp_path / "b", {HEAD: array}))
    assert found == Difference(HEAD, ("BF16", "BF16"), ((37, 16), (16, 37)))
    assert not found.within(math.inf)


def test_compare_of_another_dtype_measures_the_rounding(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", dtype="F32"), write(tmp_path / "b")
    found = compare(a, b)
    assert {item.dtypes for item in found.differences} == {("F32", "BF16")}
    assert all(0 < (item.max_relative or 0) <= 2**-8 for item in found.differences)
    assert not found.same
    assert compare(a, b, tolerance=2**-8).same
    assert not compare(a, b, tolerance=1e-9).same


def test_compare_of_nans_is_by_pattern(tmp_path: Path) -> None:
    def nan(pattern: int) -> dict[str, Array | None]:
        return changed(NORM, lambda array: array.view(np.uint16).__setitem__(3, pattern))

    a = write(tmp_path / "a", nan(0x7FC0))
    assert compare(a, write(tmp_path / "b", nan(0x7FC0))).same
    other = only_difference(a, write(tmp_path / "c", nan(0x7FC1)))
    assert (other.num_different, other.max_absolute) == (1, 0.0)
    lost = compare(a, write(tmp_path / "d"))
    assert lost.differences[0].max_absolute == math.inf
    assert lost.to_plain()["differences"][0]["max_absolute"] == "inf"


def test_compare_of_infinities_and_negative_zero(tmp_path: Path) -> None:
    plus = write(tmp_path / "a", changed(NORM, lambda array: array.__setitem__(slice(0, 2), [np.inf, 0.0])))
    minus = write(tmp_path / "b", changed(NORM, lambda array: array.__setitem__(slice(0, 2), [np.inf, -0.0])))
    found = only_difference(plus, minus)
    assert (found.num_different, found.max_absolute) == (1, 0.0)
    opposite = write(tmp_path / "c", changed(NORM, lambda array: array.__setitem__(slice(0, 2), [-np.inf, 0.0])))
    assert only_difference(plus, opposite).max_absolute == math.inf


def test_compare_holds_a_few_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big: dict[str, Array | None] = {HEAD: np.ones((2048, 4096), np.float16)}
    other: dict[str, Array | None] = {HEAD: np.full((2048, 4096), 1.5, np.float16)}
    a, b = write(tmp_path / "a", big), write(tmp_path / "b", other)
    monkeypatch.setattr(comparison, "BLOCK_BYTES", 2**18)
    tracemalloc.start()
    try:
        found = only_difference(a, b)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.num_different, found.max_absolute, found.max_relative) == (2**23, 0.5, 0.5)
    assert peak < 40 * 2**18


def test_command_ends_with_0_for_the_same_and_1_for_different(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", changed(NORM, lambda array: array.__setitem__(0, 100)))
    same, other = run(a, a), run(a, b)
    assert (same.exit_code, other.exit_code) == (0, 1)
    assert f"{NORM}: BF16, 1 of 16 elements differ, max absolute" in other.output
    assert run(a, b, "--tolerance", "100").exit_code == 0


def test_command_json_holds_every_difference(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", {HEAD: None, **changed(NORM, lambda array: array.__setitem__(0, 100))})
    result = run(a, b, "--json")
    plain = json.loads(result.output)
    assert result.exit_code == 1
    assert (plain["same"], plain["only_a"], plain["only_b"]) == (False, [HEAD], [])
    assert [(item["name"], item["num_different"]) for item in plain["differences"]] == [(NORM, 1)]


def test_command_with_no_checkpoint_has_the_exit_code_of_a_missing_source(tmp_path: Path) -> None:
    assert run(write(tmp_path / "a"), str(tmp_path / "none")).exit_code == SourceMissingError.exit_code


def test_compare_of_a_checkpoint_and_its_own_conversion_is_identical(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    stages.convert(build_spec(source, topology={"tp": 2, "pp": 2}), tmp_path / "converted")
    found = compare(source, str(tmp_path / "converted"))
    assert found.same
    assert found.num_identical == len(random_arrays(CONFIG))
