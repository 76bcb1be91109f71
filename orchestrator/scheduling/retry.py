"""Decide whether and when a failed step is tried again."""

from __future__ import annotations

from orchestrator.planning.steps import Failure, FailureKind
from orchestrator.spec.cluster import RetrySpec


def retry_delay(policy: RetrySpec, failure: Failure, attempt: int) -> float | None:
    """Return the seconds until a step is tried again whose attempt number `attempt` (from 1) has failed; None: never.

    Only infrastructure failures are retried. The delay doubles with each attempt. A step handed over to another node restarts at
    once, without a limit.
    """
    if failure.kind is FailureKind.HANDED_OVER:
        return 0.0
    if failure.kind is not FailureKind.INFRASTRUCTURE or attempt >= policy.max_attempts:
        return None
    return min(policy.backoff_seconds * 2.0 ** (attempt - 1), policy.max_backoff_seconds)


def leaves_drained_node(seconds_left: float, elapsed_seconds: float, estimated_seconds: float) -> bool:
    """Whether a step on a node that goes away in `seconds_left` should restart elsewhere now instead of finishing.

    Estimates may be wrong and a restart loses the work done so far. So the step leaves only when even half of its estimated
    remaining time exceeds the node's.
    """
    remaining = max(estimated_seconds - elapsed_seconds, 0.0)
    return remaining / 2 > seconds_left
