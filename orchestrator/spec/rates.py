"""Rates of a cluster for the simulation: steps, links, the store, and the price of nodes.

A step reads its bytes from the store, computes, and writes its bytes to the store. It computes for `seconds` whatever its size, and
for `seconds_per_gb` of each 10^9 bytes of its work (Estimate.work_bytes). Nothing that is built depends on any of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from orchestrator.spec.cluster import KindName
from orchestrator.spec.decoding import Frozen
from orchestrator.spec.values import NumBytes

BytesPerSecond = Annotated[NumBytes, Field(ge=1)]


class StepRate(Frozen):
    """Time of a kind of step on one CPU slot, without transfers."""

    seconds: float = Field(default=0.0, ge=0)
    """Fixed time per step."""
    seconds_per_gb: float = Field(default=0.0, ge=0)
    """Per 10^9 bytes of the step's work."""

    def of(self, work_bytes: int) -> float:
        """Seconds of a step."""
        return self.seconds + self.seconds_per_gb * work_bytes / 1e9


STEP_RATES: dict[str, StepRate] = {
    "miniature": StepRate(seconds=6.0),
    "reference": StepRate(seconds=10.0, seconds_per_gb=7.0),
    "calibrate": StepRate(seconds=15.0, seconds_per_gb=20.0),
    "convert": StepRate(seconds=0.5, seconds_per_gb=1.0),
    "build": StepRate(seconds=4.0, seconds_per_gb=20.0),
    "verify": StepRate(seconds=5.0, seconds_per_gb=10.0),
    "export": StepRate(seconds=3.0, seconds_per_gb=10.0),
}
"""The defaults, which order the schedule too. Ordinary CPU cores and backend tensorrt_rtx, measured on a small model:
`orchestrator rates` prints those of your own machines."""


class PoolRates(Frozen):
    """Rates of each node of a pool."""

    network: BytesPerSecond | None = None
    """Bytes per second between a node and the store, in each direction; absent: no limit."""
    disk: BytesPerSecond | None = None
    """Bytes per second of the disk that reads and writes share; absent: no limit."""
    price_per_hour: float = Field(default=0.0, ge=0)
    """Price of one node, in your currency."""
    speed: float = Field(default=1.0, gt=0)
    """Factor by which steps compute faster than the step rates say."""
    steps: dict[KindName, StepRate] = Field(default_factory=dict)
    """Step rates of this pool, e.g. of engines built on a GPU."""


class RatesSpec(Frozen):
    """Rates of a cluster."""

    start_seconds: float = Field(default=1.0, ge=0)
    """Start-up time of a step: its process or actor, and its imports."""
    store_read: BytesPerSecond | None = None
    """Bytes per second that all nodes together read from the store. Absent: no limit."""
    store_write: BytesPerSecond | None = None
    """Bytes per second that all nodes together write to the store. Absent: no limit."""
    steps: dict[KindName, StepRate] = Field(default_factory=dict)
    """Step rates by kind. Absent kinds have the defaults."""
    pools: dict[str, PoolRates] = Field(default_factory=dict)
    """Rates by pool of the cluster file. An absent pool has no limits and costs nothing."""

    def pool(self, name: str) -> PoolRates:
        return self.pools.get(name, PoolRates())

    def compute_seconds(self, kind: str, work_bytes: int, pool: str) -> float:
        """Seconds of a step without transfers."""
        rates = self.pool(pool)
        tables: tuple[Mapping[Any, StepRate], ...] = (rates.steps, self.steps, STEP_RATES)
        rate = next(table[kind] for table in tables if kind in table)
        return self.start_seconds + rate.of(work_bytes) / rates.speed


def fit(points: Iterable[tuple[int, float]], default: StepRate) -> StepRate | None:
    """Fit a rate to measured (work bytes, seconds) by least squares; None without points.

    Points of much the same size do not tell the two parts apart: then the default's `seconds` stand, as far as the mean allows.
    """
    found = list(points)
    if not found:
        return None
    mean_gb = sum(size for size, _ in found) / len(found) / 1e9
    mean_seconds = sum(seconds for _, seconds in found) / len(found)
    spread = sum((size / 1e9 - mean_gb) ** 2 for size, _ in found)
    slope = 0.0
    if spread > len(found) * (0.1 * mean_gb) ** 2:
        slope = sum((size / 1e9 - mean_gb) * (seconds - mean_seconds) for size, seconds in found) / spread
    base = mean_seconds - slope * mean_gb
    if slope <= 0 or base < 0:
        base = min(default.seconds, mean_seconds)
        slope = (mean_seconds - base) / mean_gb if mean_gb else 0.0
        base = base if mean_gb else mean_seconds
    return StepRate(seconds=round(base, 3), seconds_per_gb=round(slope, 3))
