from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.base.errors import ClusterError, SpecError
from orchestrator.clusters.simulation import Simulation, longest_chain, measured, parse_failures, seconds_alone, simulate, timeline
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Estimate, Failure, FailureKind, Kind, Resources, Step
from orchestrator.spec.cluster import ClusterSpec, PoolSpec, RetrySpec
from orchestrator.spec.rates import PoolRates, RatesSpec, StepRate
from tests.support.plans import LOST, WRONG, named, outcome_of

GB = 10**9
KINDS = {"convert": Kind.CONVERT, "build": Kind.BUILD, "verify": Kind.VERIFY}
RATES = RatesSpec(
    start_seconds=1.0,
    store_read=4 * GB,
    steps={"convert": StepRate(seconds=0.5, seconds_per_gb=1.0), "build": StepRate(seconds=10.0)},
    pools={"default": PoolRates(network=GB, disk=2 * GB, price_per_hour=36.0)},
)


def plan_of(steps: Mapping[str, tuple[Kind, list[str], int, int, int]]) -> Plan:
    """Steps by name: kind, names of needs, bytes read, written, and of memory."""
    made: dict[str, Step] = {}
    for name, (kind, needs, read, written, memory) in steps.items():
        made[name] = Step(
            kind=kind, version=1, name=name, options={"name": name}, needs=tuple(made[need].digest for need in needs),
            resources=Resources(memory_bytes=memory),
            estimate=Estimate(read_bytes=read, write_bytes=written, work_bytes=written),
        )  # fmt: skip
    nothing: Any = None
    return Plan(nothing, nothing, tuple(made.values()))


def place(nodes: int = 1, cpus: int = 2, **changes: Any) -> ClusterSpec:
    pool = PoolSpec(nodes=nodes, cpus=cpus, memory=8 * GB)
    return ClusterSpec(store="memory://none", pools={"default": pool}, retries=RetrySpec(backoff_seconds=4.0), **changes)


ONE = plan_of({"a": (Kind.CONVERT, [], 2 * GB, GB, GB)})
PAIR = plan_of({"a": (Kind.CONVERT, [], 2 * GB, GB, GB), "b": (Kind.CONVERT, [], 2 * GB, GB, 3 * GB)})


def test_simulate_one_step_reads_computes_and_writes() -> None:
    found = simulate(ONE, place(), RATES)
    assert found.makespan_seconds == 2.0 + (1.0 + 0.5 + 1.0) + 1.0
    assert found.critical_seconds == found.makespan_seconds
    assert found.critical_path == ("a",)
    assert (found.links["store/read"].num_bytes, found.links["store/write"].num_bytes) == (2 * GB, GB)
    assert found.links["store/read"].utilization == pytest.approx(2 / (4 * 5.5))
    assert found.links["store/write"].utilization is None
    use = found.pools["default"]
    assert (use.read_bytes, use.write_bytes, use.peak_memory_bytes, use.slots) == (2 * GB, GB, GB, 2)
    assert use.utilization == 0.5
    assert found.cost == use.cost == pytest.approx(5.5 * 36 / 3600)


def test_simulate_two_steps_of_a_node_share_its_network() -> None:
    found = simulate(PAIR, place(), RATES)
    assert found.makespan_seconds == 4.0 + 2.5 + 2.0
    assert found.critical_seconds == 5.5
    assert found.pools["default"].peak_memory_bytes == 4 * GB


def test_simulate_two_nodes_share_nothing_but_the_store() -> None:
    found = simulate(PAIR, place(nodes=2, cpus=1), RATES)
    assert found.makespan_seconds == 5.5
    assert {span.node for span in found.spans} == {"default/0", "default/1"}
    slow_store = RATES.model_copy(update={"store_read": GB})
    assert simulate(PAIR, place(nodes=2, cpus=1), slow_store).makespan_seconds == 4.0 + 2.5 + 1.0


def test_simulate_scripted_loss_is_tried_again_after_the_backoff() -> None:
    found = simulate(ONE, place(), RATES, {("a", 1): LOST})
    assert found.retries == 1
    assert found.failures == {}
    assert found.makespan_seconds == 4.5 + 4.0 + 5.5
    assert [(span.attempt, span.failed) for span in found.spans] == [(1, True), (2, False)]
    assert found.links["store/read"].num_bytes == 4 * GB
    assert found.links["store/write"].num_bytes == GB


def test_simulate_own_error_ends_the_build_and_says_why() -> None:
    found = simulate(ONE, place(), RATES, {("a", 1): WRONG})
    assert found.failures == {"a": "weights are wrong"}
    assert found.retries == 0


def test_simulate_pool_with_gpus_runs_builds_there() -> None:
    plan = plan_of({"a": (Kind.CONVERT, [], 0, GB, 0), "b": (Kind.BUILD, ["a"], 0, GB, 0)})
    pools = {"cpu": PoolSpec(nodes=2, cpus=4, memory=GB, steps=("convert",)), "gpu": PoolSpec(cpus=2, gpus=1, memory=GB)}
    found = simulate(plan, ClusterSpec(store="memory://none", pools=pools), RatesSpec(pools={"gpu": PoolRates(price_per_hour=1.0)}))
    assert [(span.name, span.pool) for span in found.spans] == [("a", "cpu"), ("b", "gpu")]
    assert (found.pools["cpu"].slots, found.pools["gpu"].slots) == (8, 2)
    assert found.pools["cpu"].cost == 0.0


def test_simulate_plan_that_no_pool_can_hold_is_refused() -> None:
    with pytest.raises(ClusterError, match="a: no pool runs convert steps"):
        simulate(ONE, place().model_copy(update={"pools": {"default": PoolSpec(steps=("build",))}}), RATES)


def test_simulate_rates_of_a_pool_that_is_not_there_are_refused() -> None:
    with pytest.raises(SpecError, match="pools that the cluster does not have: defualt"):
        simulate(ONE, place(), RatesSpec(pools={"defualt": PoolRates()}))


names = st.integers(1, 14).flatmap(
    lambda count: st.lists(
        st.tuples(
            st.sampled_from(list(KINDS.values())), st.sets(st.integers(0, count)), st.integers(0, 50 * GB), st.integers(0, 50 * GB),
            st.integers(0, 8 * GB),
        ),
        min_size=count, max_size=count,
    )
)  # fmt: skip
speeds = st.one_of(st.none(), st.integers(10**6, 10**10))


@settings(max_examples=60)
@given(names, st.integers(1, 3), st.integers(1, 3), speeds, speeds, speeds, speeds)
def test_simulate_bytes_are_conserved_and_no_bound_is_beaten(
    drawn: list[tuple[Kind, set[int], int, int, int]],
    nodes: int,
    cpus: int,
    read: int | None,
    write: int | None,
    network: int | None,
    disk: int | None,
) -> None:
    """The makespan is no less than the critical path, than the slots' work, and than what each link needs for its bytes."""
    steps = {
        str(number): (kind, [str(need) for need in sorted(needs) if need < number], got, put, memory)
        for number, (kind, needs, got, put, memory) in enumerate(drawn)
    }
    plan = plan_of(steps)
    rates = RatesSpec(store_read=read, store_write=write, pools={"default": PoolRates(network=network, disk=disk)})
    found = simulate(plan, place(nodes, cpus), rates)
    least = found.makespan_seconds * (1 + 1e-9)
    assert {span.name for span in found.spans} == set(steps)
    assert least >= found.critical_seconds
    assert least >= sum(seconds_alone(step, place(), rates) for step in plan.steps) / (nodes * cpus)
    assert 0 <= found.pools["default"].utilization <= 1 + 1e-9
    for name, column in (("store/read", 2), ("store/write", 3)):
        moved = sum(step[column] for step in steps.values())
        assert found.links[name].num_bytes == moved
        for limit in (found.links[name].bytes_per_second, network * nodes if network else None, disk * nodes if disk else None):
            assert limit is None or least >= moved / limit
    ends = {span.name: span.end for span in found.spans}
    for span in found.spans:
        assert all(ends[need] <= span.start for need in steps[span.name][1]), "a step began before its needs were there"
    assert largest_load(found) <= nodes * cpus


def largest_load(found: Simulation) -> int:
    rows = timeline(found.spans, found.makespan_seconds, 10)
    assert all(len(bars) == 10 for _, _, bars, _ in rows)
    return max(most for _, _, _, most in rows)


def test_longest_chain_takes_the_slowest_need() -> None:
    plan = plan_of({name: (Kind.CONVERT, needs, 0, 0, 0) for name, needs in {"a": [], "b": [], "c": ["a", "b"], "d": []}.items()})
    seconds = {named(plan, name).digest: value for name, value in {"a": 1.0, "b": 5.0, "c": 2.0, "d": 6.0}.items()}
    total, path = longest_chain(plan, seconds)
    assert total == 7.0
    assert [step.name for step in path] == ["b", "c"]


def test_parse_failures_reads_step_attempt_and_kind() -> None:
    found = parse_failures(["a:2", "a:3:application"], ONE)
    assert found == {
        ("a", 2): Failure(kind=FailureKind.INFRASTRUCTURE, message="failed as scripted"),
        ("a", 3): Failure(kind=FailureKind.APPLICATION, message="failed as scripted"),
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [("aa:1", r"no step 'aa' \(did you mean a\?\)"), ("a", "expected STEP:ATTEMPT"), ("a:0", "expected STEP"),
     ("a:1:fire", "expected STEP:ATTEMPT or STEP:ATTEMPT:KIND")],
)  # fmt: skip
def test_parse_failures_wrong_word_is_named(word: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_failures([word], ONE)


def test_measured_rates_come_from_committed_outcomes_alone() -> None:
    outcome = outcome_of(PAIR.steps[0]).model_copy(update={"seconds": 2.5})
    found = measured(PAIR, {outcome.digest: outcome})
    assert list(found) == ["convert"]
    assert found["convert"].of(GB) == pytest.approx(2.5)


def test_timeline_shows_when_a_pool_was_busy() -> None:
    found = simulate(PAIR, place(cpus=1), RATES)
    assert timeline(found.spans, found.makespan_seconds, 4) == [("default", Kind.CONVERT, "████", 1)]
