from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import VerificationError
from orchestrator.planning.facts import Verification
from orchestrator.spec.build import ToleranceSpec
from orchestrator.work.verify.compare import check, compare

REFERENCE = np.array([[1.0, 4.0, 2.0], [0.0, -8.0, 3.0]], np.float32)
EXACT = {"num_positions": 2, "max_absolute_error": 0.0, "max_relative_error": 0.0, "mean_kl": 0.0, "top1_agreement": 1.0}


def verification(**changes: Any) -> Verification:
    return Verification(**{**EXACT, **changes})


def test_compare_same_logits_are_exact() -> None:
    assert compare(REFERENCE, REFERENCE) == verification()


def test_compare_worst_position_counts_relative_to_its_own_largest_logit() -> None:
    ours = REFERENCE + np.array([[0.0, 0.3, 0.0], [0.0, 0.0, -0.4]], np.float32)
    found = compare(ours, REFERENCE)
    assert found.max_absolute_error == pytest.approx(0.4)
    assert found.max_relative_error == pytest.approx(0.3 / 4)
    assert found.top1_agreement == 1.0


def test_compare_kl_is_that_of_the_reference_averaged_over_positions() -> None:
    ours = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    expected = []
    for mine, theirs in zip(ours, REFERENCE, strict=True):
        p = [math.exp(value) / sum(math.exp(other) for other in theirs) for value in theirs]
        q = [math.exp(value) / sum(math.exp(other) for other in mine) for value in mine]
        expected.append(sum(one * math.log(one / other) for one, other in zip(p, q, strict=True)))
    assert compare(ours, REFERENCE).mean_kl == pytest.approx(sum(expected) / 2)


def test_compare_agreement_is_the_share_of_equal_first_choices() -> None:
    ours = np.array([[5.0, 4.0, 2.0], [0.0, -8.0, 3.0]], np.float32)
    assert compare(ours, REFERENCE).top1_agreement == 0.5


def test_compare_shifted_logits_have_no_divergence_but_an_error() -> None:
    found = compare(REFERENCE + 100, REFERENCE)
    assert found.mean_kl == pytest.approx(0.0, abs=1e-9)
    assert found.max_absolute_error == pytest.approx(100.0)


def test_compare_large_logits_do_not_overflow() -> None:
    large = np.array([[3e38, -3e38]], np.float32)
    assert compare(large, large).mean_kl == 0.0


def test_compare_reference_of_zeros_has_a_finite_error() -> None:
    found = compare(np.full((1, 3), 1e-3, np.float32), np.zeros((1, 3), np.float32))
    assert math.isfinite(found.max_relative_error)
    assert found.max_relative_error > 1


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 50))
def test_compare_random_logits_have_no_negative_numbers(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    ours, theirs = generator.standard_normal((2, 4, 9)).astype(np.float32) * np.float32(scale)
    found = compare(ours, theirs)
    assert found.num_positions == 4
    assert min(found.max_absolute_error, found.max_relative_error, found.mean_kl) >= 0
    assert 0 <= found.top1_agreement <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_compare_logits_that_are_not_finite_are_infinitely_wrong(value: float) -> None:
    ours = REFERENCE.copy()
    ours[0, 1] = value
    found = compare(ours, REFERENCE)
    assert found.max_relative_error > 1e100
    with pytest.raises(VerificationError):
        check(found, ToleranceSpec(max_relative_error=1e9, max_mean_kl=1e9, min_top1_agreement=0))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_reference_that_is_not_finite_is_refused(value: float) -> None:
    reference = REFERENCE.copy()
    reference[0, 0] = value
    with pytest.raises(VerificationError):
        check(compare(REFERENCE, reference), ToleranceSpec(min_top1_agreement=0.5))


TOLERANCE = ToleranceSpec(max_relative_error=0.1, max_mean_kl=0.2, min_top1_agreement=0.9)


@pytest.mark.parametrize(
    "changes", [{}, {"max_relative_error": 0.1}, {"mean_kl": 0.2}, {"top1_agreement": 0.9}, {"max_absolute_error": 1e9}]
)
def test_check_numbers_at_tolerance_pass(changes: dict[str, float]) -> None:
    check(verification(**changes), TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_relative_error": 0.11}, "relative error 0.11 > 0.1"),
        ({"mean_kl": 0.21}, "mean KL 0.21 > 0.2"),
        ({"top1_agreement": 0.89}, "top-1 agreement 0.8900 < 0.9"),
    ],
)
def test_check_number_beyond_tolerance_is_named(changes: dict[str, float], words: str) -> None:
    with pytest.raises(VerificationError) as caught:
        check(verification(**changes), TOLERANCE)
    assert caught.value.message == f"the engines' graphs differ from the reference on 2 positions: {words}"
    assert caught.value.exit_code == 24


def test_check_several_numbers_are_all_named() -> None:
    with pytest.raises(VerificationError, match=r"relative error .*mean KL .*top-1 agreement"):
        check(verification(max_relative_error=1.0, mean_kl=1.0, top1_agreement=0.0), TOLERANCE)
