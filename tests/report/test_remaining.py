"""The time that is left: guesses of the plan, put right by what has been seen."""

from __future__ import annotations

import pytest

from orchestrator.report.remaining import Remaining


def test_remaining_is_unknown_before_a_step_has_ended() -> None:
    left = Remaining()
    left.plan({"convert/a": 1.0})
    assert left.seconds(0.0, {}) is None
    left.start("convert/a", 0.0)
    assert left.seconds(1.0, {}) is None


def test_remaining_of_steps_one_after_the_other_scales_the_guesses_of_their_kind() -> None:
    left = Remaining()
    left.plan({"convert/a": 1.0, "convert/b": 1.0, "build/rank0": 10.0})
    left.start("convert/a", 100.0)
    left.end("convert/a", 103.0)
    assert left.seconds(103.0, {}) == pytest.approx(3.0 + 30.0)  # nothing of its kind has ended: the scale of all
    left.start("convert/b", 103.0)
    left.end("convert/b", 106.0)
    left.start("build/rank0", 106.0)
    assert left.seconds(116.0, {"build/rank0": 0.5}) == pytest.approx(10.0)


def test_remaining_of_steps_side_by_side_is_divided_but_never_below_the_longest() -> None:
    left = Remaining()
    left.plan({f"convert/{number}": 1.0 for number in range(6)})
    for number in (0, 1):
        left.start(f"convert/{number}", 0.0)
    for number in (0, 1):
        left.end(f"convert/{number}", 2.0)
    assert left.seconds(2.0, {}) == pytest.approx(4 * 2.0 / 2)
    for number in (2, 3, 4):
        left.start(f"convert/{number}", 2.0)
        left.end(f"convert/{number}", 4.0)
    assert left.seconds(4.0, {}) == pytest.approx(2.0)


def test_remaining_after_a_failed_attempt_counts_the_step_whole_again() -> None:
    left = Remaining()
    left.plan({"convert/a": 1.0, "convert/b": 1.0})
    left.start("convert/a", 0.0)
    left.end("convert/a", 2.0)
    left.start("convert/b", 2.0)
    left.drop("convert/b")
    assert left.seconds(3.0, {}) == pytest.approx(2.0)
