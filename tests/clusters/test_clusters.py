from __future__ import annotations

import queue
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.clusters.processes import StepProcesses, devices
from orchestrator.clusters.simulated import SimulatedCluster
from orchestrator.events import StepFailed, StepStarted, StepSucceeded
from orchestrator.planning.steps import FailureKind, Kind
from orchestrator.scheduling.cluster import Cluster
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from tests.contracts.cluster_contract import ClusterContract, ContractTasks, collect
from tests.support.plans import LOST, WRONG, task

GB = 10**9


def spec(**pools: Any) -> ClusterSpec:
    return ClusterSpec.model_validate({"store": "memory://none", "pools": pools or {"default": PoolSpec(cpus=2, memory=8 * GB)}})


def history(cluster: SimulatedCluster) -> list[tuple[float, float, str]]:
    return [(span.start, span.end, span.name) for span in cluster.spans]


class TestSimulatedCluster(ClusterContract):
    @pytest.fixture
    def tasks(self) -> ContractTasks:
        return ContractTasks(tuple(task(f"good{number}", seconds=1.0 + number) for number in range(4)), task("bad"))

    @pytest.fixture
    def cluster(self) -> Iterator[Cluster]:
        failures = {("bad", attempt): WRONG for attempt in (1, 2, 3)}
        made = SimulatedCluster(spec(), failures)
        yield made
        made.close()

    @pytest.fixture
    def two_cores(self, cluster: Cluster) -> Cluster:
        return cluster  # what `spec` says


def test_simulated_clock_jumps_to_the_end_of_each_step() -> None:
    cluster = SimulatedCluster(spec())
    tasks = [task("slow", seconds=100.0), task("quick", seconds=10.0)]
    for item in tasks:
        cluster.start(item)
    collect(cluster, tasks[1:])
    assert cluster.now() == 10.0
    collect(cluster, tasks[:1])
    assert cluster.now() == 100.0
    assert history(cluster) == [(0.0, 10.0, "quick"), (0.0, 100.0, "slow")]


def test_simulated_slots_are_never_overbooked() -> None:
    cluster = SimulatedCluster(spec(default=PoolSpec(cpus=2)))
    tasks = [task(str(number), seconds=5.0) for number in range(5)]
    for item in tasks:
        cluster.start(item)
    assert [event.event for event in cluster.events(0.0)] == ["started", "started"]
    collect(cluster, tasks)
    assert history(cluster) == [(0.0, 5.0, "0"), (0.0, 5.0, "1"), (5.0, 10.0, "2"), (5.0, 10.0, "3"), (10.0, 15.0, "4")]


def test_simulated_events_waits_no_longer_than_it_is_told() -> None:
    cluster = SimulatedCluster(spec())
    cluster.start(task("long", seconds=60.0))
    assert [event.event for event in cluster.events(None)] == ["started"]
    assert cluster.events(7.0) == []
    assert cluster.now() == 7.0
    assert [event.event for event in cluster.events(53.0)] == ["succeeded"]
    assert cluster.now() == 60.0


def test_simulated_scripted_failure_hits_its_own_attempt_only() -> None:
    cluster = SimulatedCluster(spec(), {("a", 1): LOST})
    kinds = []
    for attempt in (1, 2):
        item = task("a", attempt=attempt)
        cluster.start(item)
        kinds.append([type(event) for event in collect(cluster, [item])])
    assert kinds == [[StepStarted, StepFailed], [StepStarted, StepSucceeded]]


def test_simulated_events_name_their_node() -> None:
    cluster = SimulatedCluster(spec())
    item = task("a")
    cluster.start(item)
    started, succeeded = collect(cluster, [item])
    assert isinstance(started, StepStarted)
    assert isinstance(succeeded, StepSucceeded)
    assert started.node == succeeded.outcome.node == "default/0"
    assert succeeded.outcome.seconds == 1.0


def test_simulated_fallback_of_a_pool_runs_on_the_nodes_of_another() -> None:
    pools = {
        "small": PoolSpec(cpus=1, gpus=1, labels={"gpu": "L40S"}, fallback=({"gpu": "H100"},), steps=("calibrate",)),
        "large": PoolSpec(cpus=2, gpus=1, labels={"gpu": "H100"}),
    }
    cluster = SimulatedCluster(spec(**pools))
    tasks = [task(str(number), kind=Kind.CALIBRATE) for number in range(3)]
    for item in tasks:
        cluster.start(item)
    collect(cluster, tasks)
    assert [(span.name, span.node, span.pool) for span in cluster.spans] == [
        ("0", "small/0", "small"), ("1", "large/0", "large"), ("2", "small/0", "small"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"), [((1,), None, "1"), ((0, 2), "4,5,6", "4,6"), ((1,), "GPU-a, GPU-b", "GPU-b"), ((0,), "", "0")]
)
def test_devices_are_numbers_among_those_that_this_process_sees(gpus: tuple[int, ...], visible: str | None, expected: str) -> None:
    assert devices(gpus, visible) == expected


def test_processes_of_a_worker_whose_lines_are_no_events_end_as_lost_instead_of_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that dies of a line it cannot read leaves its step running for ever."""
    events: queue.Queue[object] = queue.Queue()
    monkeypatch.setattr(sys, "executable", shutil.which("echo"))
    processes = StepProcesses(1, events.put)
    processes.start(task("a"), (), "here")
    found = events.get(timeout=30)
    processes.close()
    assert isinstance(found, StepFailed)
    assert found.failure.kind is FailureKind.INFRASTRUCTURE
