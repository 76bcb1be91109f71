from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.steps import Failure, FailureKind
from orchestrator.scheduling.retry import leaves_drained_node, retry_delay
from orchestrator.spec.cluster import RetrySpec
from tests.support.plans import LOST, WRONG

POLICY = RetrySpec(max_attempts=5, backoff_seconds=2.0, max_backoff_seconds=7.0)


@pytest.mark.parametrize(("attempt", "delay"), [(1, 2.0), (2, 4.0), (3, 7.0), (4, 7.0)])
def test_retry_delay_lost_machine_is_tried_again_after_doubling_capped_delays(attempt: int, delay: float) -> None:
    assert retry_delay(POLICY, LOST, attempt) == delay


@pytest.mark.parametrize("attempt", [5, 6])
def test_retry_delay_last_attempt_gives_up(attempt: int) -> None:
    assert retry_delay(POLICY, LOST, attempt) is None


@pytest.mark.parametrize("kind", [FailureKind.APPLICATION, FailureKind.CANCELLED])
def test_retry_delay_own_error_and_cancellation_are_never_tried_again(kind: FailureKind) -> None:
    assert retry_delay(POLICY, Failure(kind=kind, message="no"), 1) is None


def test_retry_delay_policy_of_one_attempt_never_retries() -> None:
    assert retry_delay(RetrySpec(max_attempts=1), LOST, 1) is None


@given(
    attempts=st.integers(1, 20), backoff=st.floats(0, 100), limit=st.floats(0, 100), failure=st.sampled_from([LOST, WRONG])
)  # fmt: skip
def test_retry_delay_tries_at_most_max_attempts_and_never_waits_longer_than_the_limit(
    attempts: int, backoff: float, limit: float, failure: Failure
) -> None:
    policy = RetrySpec(max_attempts=attempts, backoff_seconds=backoff, max_backoff_seconds=limit)
    decisions = [retry_delay(policy, failure, attempt) for attempt in range(1, attempts + 1)]
    assert decisions[-1] is None
    delays = [delay for delay in decisions if delay is not None]
    assert len(delays) == (attempts - 1 if failure is LOST else 0)
    assert all(0 <= delay <= limit for delay in delays)
    assert delays == sorted(delays)


def test_retry_delay_step_handed_over_goes_elsewhere_at_once_however_often() -> None:
    moved = Failure(kind=FailureKind.HANDED_OVER, message="node is taken back")
    assert retry_delay(RetrySpec(max_attempts=1), moved, 7) == 0.0


@pytest.mark.parametrize(
    ("left", "elapsed", "estimated", "leaves"),
    [(30, 0, 50, False), (30, 0, 61, True), (30, 40, 80, False), (0, 5, 4, False), (0, 3, 4, True)],
)
def test_leaves_drained_node_only_when_half_of_what_is_left_is_too_long(
    left: float, elapsed: float, estimated: float, leaves: bool
) -> None:
    assert leaves_drained_node(left, elapsed, estimated) is leaves
