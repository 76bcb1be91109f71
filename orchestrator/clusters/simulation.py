"""Simulate a build: the real driver on a cluster that jumps from event to event, at given rates, with scripted failures."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.base.errors import ClusterError, SpecError
from orchestrator.clusters.simulated import STORE_READ, STORE_WRITE, SimulatedCluster, Span, node_links
from orchestrator.events import Event, StepRetried
from orchestrator.planning.places import unplaceable, with_offered_gpus
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Failure, FailureKind, Kind, Outcome, Step
from orchestrator.scheduling.driver import Result, drive
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.rates import STEP_RATES, RatesSpec, StepRate, fit


@dataclass(frozen=True)
class PoolUse:
    """Use of a pool's nodes until the build was over."""

    nodes: int
    slots: int
    """CPU slots of all nodes."""
    busy_seconds: float
    """Busy time of the slots: the sum over attempts."""
    utilization: float
    """Busy fraction of the slots over the makespan, 0 to 1."""
    peak_memory_bytes: int
    """Largest memory that steps reserved on one node."""
    read_bytes: int
    """Bytes read from the store."""
    write_bytes: int
    """Bytes written to the store."""
    cost: float
    """Price of all nodes for the whole makespan."""


@dataclass(frozen=True)
class LinkUse:
    """Use of one direction of the store, all nodes together."""

    num_bytes: int
    bytes_per_second: int | None
    """Limit of the direction. None: no limit."""
    utilization: float | None
    """Used fraction of the limit over the makespan. None: no limit."""


@dataclass(frozen=True)
class Simulation:
    """Result of a simulated build."""

    makespan_seconds: float
    critical_seconds: float
    """Seconds of the longest chain of steps, each running alone: more nodes cannot make the build faster."""
    critical_path: tuple[str, ...]
    pools: dict[str, PoolUse]
    links: dict[str, LinkUse]
    cost: float
    retries: int
    failures: dict[str, str]
    """Reason of each step for which the build would end without a release."""
    spans: tuple[Span, ...] = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """Return the result as plain data."""
        plain = asdict(self)
        plain["spans"] = [{**span, "kind": span["kind"].value} for span in plain["spans"]]
        return plain


def simulate(
    plan: Plan, cluster_spec: ClusterSpec, rates: RatesSpec, failures: Mapping[tuple[str, int], Failure] | None = None
) -> Simulation:
    """Drive the whole plan, with nothing committed.

    Raises ClusterError when a pool lacks a step's resources, SpecError for rates of missing pools.
    """
    unknown = [name for name in rates.pools if name not in cluster_spec.pools]
    if unknown:
        raise SpecError(
            f"the rates name pools that the cluster does not have: {', '.join(unknown)}",
            f"It has: {', '.join(cluster_spec.pools)}.",
        )
    plan = with_offered_gpus(plan, cluster_spec)
    problems = unplaceable(plan, cluster_spec)
    if problems:
        raise ClusterError("the cluster cannot run this plan: " + "; ".join(problems), "Add a pool for these steps.")
    cluster = SimulatedCluster(cluster_spec, failures, rates)
    events: Counter[type[Event]] = Counter()
    result = drive(plan, {}, cluster, cluster_spec, lambda event: events.update([type(event)]))
    return _measure(plan, cluster_spec, rates, cluster, result, events[StepRetried])


def _measure(
    plan: Plan, cluster_spec: ClusterSpec, rates: RatesSpec, cluster: SimulatedCluster, result: Result, num_retries: int
) -> Simulation:
    makespan = max((span.end for span in cluster.spans), default=0.0)
    alone = {step.digest: seconds_alone(step, cluster_spec, rates) for step in plan.steps}
    critical, path = longest_chain(plan, alone)
    pools = {}
    for name, nodes in cluster.nodes.items():
        busy = sum(span.end - span.start for span in cluster.spans if span.pool == name)
        links = [node_links(node.name) for node in nodes]
        slots = sum(node.capacity.cpus for node in nodes)
        pools[name] = PoolUse(
            nodes=len(nodes),
            slots=slots,
            busy_seconds=busy,
            utilization=busy / (slots * makespan) if makespan else 0.0,
            peak_memory_bytes=cluster.peak_memory_bytes.get(name, 0),
            read_bytes=sum(cluster.links.carried.get(inward, 0) for inward, _, _ in links),
            write_bytes=sum(cluster.links.carried.get(outward, 0) for _, outward, _ in links),
            cost=len(nodes) * rates.pool(name).price_per_hour * makespan / 3600,
        )
    return Simulation(
        makespan_seconds=makespan,
        critical_seconds=critical,
        critical_path=tuple(step.name for step in path),
        pools=pools,
        links={
            name: _link_use(cluster.links.carried.get(name, 0), limit, makespan)
            for name, limit in ((STORE_READ, rates.store_read), (STORE_WRITE, rates.store_write))
        },
        cost=sum(pool.cost for pool in pools.values()),
        retries=num_retries,
        failures={plan.step(digest).name: failure.message for digest, failure in result.failures.items()},
        spans=tuple(cluster.spans),
    )


def _link_use(num_bytes: int, limit: int | None, makespan: float) -> LinkUse:
    return LinkUse(num_bytes, limit, num_bytes / (limit * makespan) if limit and makespan else None)


def seconds_alone(step: Step, cluster_spec: ClusterSpec, rates: RatesSpec) -> float:
    """Return the seconds of a step when nothing else runs."""
    pool = cluster_spec.pool_name_for(step.kind.value)
    assert pool is not None, f"no pool runs {step.kind.value} steps"  # the plan was checked by `unplaceable`
    node = rates.pool(pool)
    estimate = step.estimate
    seconds = rates.compute_seconds(step.kind.value, estimate.work_bytes, pool)
    for num_bytes, store in ((estimate.read_bytes, rates.store_read), (estimate.write_bytes, rates.store_write)):
        limits = [limit for limit in (store, node.network, node.disk) if limit is not None]
        seconds += num_bytes / min(limits) if limits else 0.0
    return seconds


def longest_chain(plan: Plan, seconds: Mapping[str, float]) -> tuple[float, list[Step]]:
    """Return the seconds of the longest chain of needs, and its steps."""
    ends: dict[str, float] = {}
    before: dict[str, str | None] = {}
    for step in plan.steps:
        before[step.digest] = max(step.needs, key=lambda need: ends[need], default=None)
        ends[step.digest] = seconds[step.digest] + max((ends[need] for need in step.needs), default=0.0)
    last: str | None = max(ends, key=lambda digest: ends[digest], default=None)
    total = ends[last] if last is not None else 0.0
    path: list[Step] = []
    while last is not None:
        path.append(plan.step(last))
        last = before[last]
    return total, path[::-1]


def parse_failures(words: Iterable[str], plan: Plan) -> dict[tuple[str, int], Failure]:
    """Parse scripted failures from `STEP:ATTEMPT` or `STEP:ATTEMPT:KIND`. Raises SpecError."""
    names = [step.name for step in plan.steps]
    found = {}
    for word in words:
        name, _, rest = word.partition(":")
        attempt, _, kind = rest.partition(":")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise SpecError(
                f"--fail {word}: the plan has no step {name!r}" + (f" (did you mean {near[0]}?)" if near else ""),
                "`orchestrator plan SPEC` lists the steps.",
            )
        if not attempt.isdigit() or int(attempt) < 1 or kind not in ("", FailureKind.INFRASTRUCTURE, FailureKind.APPLICATION):
            raise SpecError(
                f"--fail {word}: expected STEP:ATTEMPT or STEP:ATTEMPT:KIND",
                "E.g. build/rank3:1 (infrastructure: retried) or build/rank3:1:application (the step's own error: not retried).",
            )
        failure = FailureKind(kind or FailureKind.INFRASTRUCTURE)
        found[name, int(attempt)] = Failure(kind=failure, message="failed as scripted")
    return found


def measured(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, StepRate]:
    """Return the step rates measured in the committed outcomes of a plan, by kind."""
    found = {}
    for kind in Kind:
        points = [
            (step.estimate.work_bytes, outcomes[step.digest].seconds) for step in plan.of_kind(kind) if step.digest in outcomes
        ]
        rate = fit(points, STEP_RATES[kind.value])
        if rate is not None:
            found[kind.value] = rate
    return found


_BARS = " ▁▂▃▄▅▆▇█"


def timeline(spans: Sequence[Span], makespan: float, columns: int) -> list[tuple[str, Kind, str, int]]:
    """Return pool, kind, a bar per piece of time, and the most attempts at once. The fullest piece of a row is a whole bar."""
    rows = []
    keys = sorted(
        {(span.pool, span.kind) for span in spans}, key=lambda key: min(s.start for s in spans if (s.pool, s.kind) == key)
    )
    for pool, kind in keys:
        mine = [span for span in spans if (span.pool, span.kind) == (pool, kind)]
        width = makespan / columns or 1.0
        busy = [
            sum(max(min(span.end, (column + 1) * width) - max(span.start, column * width), 0.0) for span in mine) / width
            for column in range(columns)
        ]
        top = max(busy)
        bars = "".join(_BARS[-(-int(value / top * 800) // 100)] if value else " " for value in busy)
        rows.append((pool, kind, bars, _most_at_once(mine)))
    return rows


def _most_at_once(spans: Sequence[Span]) -> int:
    changes = sorted([(span.start, 1) for span in spans] + [(span.end, -1) for span in spans])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
