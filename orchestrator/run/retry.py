"""Whether and when a failed step is tried again: a decision is a value."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.steps import Failure, FailureKind
from orchestrator.spec.cluster import RetrySpec


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after a delay."""

    delay_seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The step has failed for good."""

    reason: str


def decide(policy: RetrySpec, failure: Failure, attempt: int) -> Retry | GiveUp:
    """`attempt` counts from 1 and has just failed. Only the machinery's failures are tried again, with doubling delays.

    A step that was handed over goes elsewhere at once, however often.
    """
    if failure.kind is FailureKind.HANDED_OVER:
        return Retry(0.0)
    if failure.kind is not FailureKind.INFRASTRUCTURE:
        return GiveUp(failure.message)
    if attempt >= policy.max_attempts:
        return GiveUp(f"{failure.message} (attempt {attempt} of {policy.max_attempts})")
    return Retry(min(policy.backoff_seconds * 2 ** (attempt - 1), policy.max_backoff_seconds))


def leaves_drained_node(seconds_left: float, elapsed_seconds: float, estimated_seconds: float) -> bool:
    """Whether a step on a node that is taken back in `seconds_left` should be started elsewhere now instead of finishing.

    An estimate may be wrong, and starting again costs what has been done: the step leaves only when even half of what the
    estimate says is left is longer than the node lives.
    """
    remaining = max(estimated_seconds - elapsed_seconds, 0.0)
    return remaining / 2 > seconds_left
