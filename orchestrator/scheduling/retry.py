"""Decide whether and when a failed step is tried again."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.steps import Failure, FailureKind
from orchestrator.spec.cluster import RetrySpec


@dataclass(frozen=True, slots=True)
class Retry:
    """Decision to try again after a delay."""

    delay_seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Decision that the step has failed for good."""

    reason: str


def decide(policy: RetrySpec, failure: Failure, attempt: int) -> Retry | GiveUp:
    """Decide about attempt number `attempt` (from 1), which has just failed. Only infrastructure failures are retried.

    The delay doubles with each attempt. A step handed over to another node restarts at once, without a limit.
    """
    if failure.kind is FailureKind.HANDED_OVER:
        return Retry(0.0)
    if failure.kind is not FailureKind.INFRASTRUCTURE:
        return GiveUp(failure.message)
    if attempt >= policy.max_attempts:
        return GiveUp(f"{failure.message} (attempt {attempt} of {policy.max_attempts})")
    return Retry(min(policy.backoff_seconds * 2 ** (attempt - 1), policy.max_backoff_seconds))


def leaves_drained_node(seconds_left: float, elapsed_seconds: float, estimated_seconds: float) -> bool:
    """Whether a step on a node that goes away in `seconds_left` should restart elsewhere now instead of finishing.

    Estimates may be wrong and a restart loses the work done so far. So the step leaves only when even half of its estimated
    remaining time exceeds the node's.
    """
    remaining = max(estimated_seconds - elapsed_seconds, 0.0)
    return remaining / 2 > seconds_left
