"""A build's counters for Prometheus, exported by Ray on the driver's node.

Seconds are counters, not histograms, because the sums of Ray's histograms consist of bucket middles. An average is
rate(seconds) / rate(steps).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.events import Event, Planned, StepFailed, StepProgressed, StepRetried, StepStarted, StepSucceeded
from orchestrator.planning.facts import ConvertFacts
from orchestrator.planning.steps import Failure, FailureKind, Outcome

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "trt_build_steps_total": ("Attempts of steps that ended.", ("release", "kind", "result")),
    "trt_build_step_seconds_total": ("Time that steps took, of those that succeeded.", ("release", "kind")),
    "trt_build_step_cpu_seconds_total": ("CPU time of the same.", ("release", "kind")),
    "trt_build_read_bytes_total": ("Bytes of the source that steps read.", ("release", "kind")),
    "trt_build_written_bytes_total": ("Bytes of outputs that steps wrote.", ("release", "kind")),
    "trt_build_retries_total": ("Attempts beyond the first.", ("release", "kind")),
    "trt_build_failures_total": ("Attempts that failed, by class.", ("release", "kind", "failure", "cause", "error")),
}
"""Description and labels of each counter, by name."""
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "trt_build_steps_pending": ("Steps that have not succeeded yet.", ("release",)),
    "trt_build_steps_running": ("Attempts that run.", ("release",)),
}
PREFIX = "ray_"
"""Prefix that Ray adds to every name."""


class Metrics:
    """Counts a build's events. Ray's metrics are created when the first step begins: Ray is connected by then."""

    def __init__(self, make: Callable[[str], Any] | None = None) -> None:
        self._make = make or _ray_metric
        self._made: dict[str, Any] = {}
        self._release = ""
        self._pending = 0
        self._running: set[str] = set()
        self._read: dict[str, int] = {}

    def tell(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, Planned):
            self._release, self._pending = event.release, len(event.pending)
        elif isinstance(event, StepRetried):
            self._count("trt_build_retries_total", 1, kind=event.kind)
        elif isinstance(event, StepProgressed):
            if event.unit == "bytes":
                self._read[event.step] = event.done
        elif isinstance(event, StepStarted):
            self._running.add(event.step)
            self._gauge()
        elif isinstance(event, StepSucceeded | StepFailed):
            self._running.discard(event.step)
            if isinstance(event, StepSucceeded):
                self._pending -= 1
                self._succeeded(event.kind, event.outcome, self._read.pop(event.step, 0))
            else:
                self._failed(event.kind, event.failure)
            self._gauge()

    def _gauge(self) -> None:
        self._metric("trt_build_steps_pending").set(max(self._pending, 0), {"release": self._release})
        self._metric("trt_build_steps_running").set(len(self._running), {"release": self._release})

    def _succeeded(self, kind: str, outcome: Outcome, seen_bytes: int) -> None:
        self._count("trt_build_steps_total", 1, kind=kind, result="succeeded")
        self._count("trt_build_step_seconds_total", outcome.seconds, kind=kind)
        self._count("trt_build_step_cpu_seconds_total", outcome.usage.cpu_seconds if outcome.usage else 0, kind=kind)
        facts = outcome.facts
        read_bytes = facts.source_bytes_read if isinstance(facts, ConvertFacts) else seen_bytes
        self._count("trt_build_read_bytes_total", read_bytes, kind=kind)
        self._count("trt_build_written_bytes_total", sum(output.num_bytes for output in outcome.outputs), kind=kind)

    def _failed(self, kind: str, failure: Failure) -> None:
        moved = failure.kind is FailureKind.HANDED_OVER
        self._count("trt_build_steps_total", 1, kind=kind, result="moved" if moved else "failed")
        if not moved:
            labels = {"failure": failure.kind.value, "cause": failure.cause.value or "unknown", "error": failure.error or "none"}
            self._count("trt_build_failures_total", 1, kind=kind, **labels)

    def _count(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:
            self._metric(name).inc(amount, {"release": self._release, **labels})

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]


def _ray_metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    told, labels = (COUNTERS | GAUGES)[name]
    return (Counter if name in COUNTERS else Gauge)(name, description=told, tag_keys=labels)
