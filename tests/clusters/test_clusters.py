from __future__ import annotations

import queue
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.base.errors import ClusterError
from orchestrator.clusters.processes import StepProcesses, devices
from orchestrator.clusters.simulated import SimulatedCluster
from orchestrator.events import StepFailed, StepStarted, StepSucceeded
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.steps import FailureKind, Kind, Resources, Task
from orchestrator.run.admission import Admission, Node, by_pool
from orchestrator.run.cluster import Cluster
from orchestrator.run.labels import selects
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


def begun(admission: Admission, *tasks: Task) -> list[str]:
    for item in tasks:
        admission.add(item)
    return [placed.task.step.name for placed in admission.begin()]


def test_admission_small_task_may_pass_one_that_does_not_fit() -> None:
    admission = Admission(spec(default=PoolSpec(cpus=3, memory=10 * GB)))
    tasks = [task("first", memory_bytes=6 * GB), task("large", memory_bytes=6 * GB), task("small", memory_bytes=GB)]
    assert begun(admission, *tasks) == ["first", "small"]
    admission.end(tasks[0].step.digest)
    assert begun(admission) == ["large"]


def test_admission_task_larger_than_the_machine_runs_alone() -> None:
    admission = Admission(spec(default=PoolSpec(cpus=4, memory=10 * GB)))
    huge, other = task("huge", memory_bytes=50 * GB), task("other", memory_bytes=GB)
    assert begun(admission, huge, other) == ["huge"]
    admission.end(huge.step.digest)
    assert begun(admission) == ["other"]


def test_admission_gpus_are_counted() -> None:
    pools = {"gpu": PoolSpec(cpus=8, gpus=1, steps=("build",)), "cpu": PoolSpec(cpus=8, steps=("convert",))}
    admission = Admission(spec(**pools))
    builds = [task(f"build{number}", kind=Kind.BUILD, gpus=1) for number in range(2)]
    assert begun(admission, *builds, task("convert")) == ["build0", "convert"]
    admission.end(builds[0].step.digest)
    assert begun(admission) == ["build1"]


def test_admission_first_pool_that_lists_a_kind_takes_it() -> None:
    admission = Admission(spec(one=PoolSpec(cpus=1, steps=("convert",)), two=PoolSpec(cpus=4)))
    assert begun(admission, task("a"), task("b"), task("build", kind=Kind.BUILD)) == ["a", "build"]


def test_admission_cleared_queue_begins_nothing() -> None:
    admission = Admission(spec())
    admission.add(task("a"))
    admission.clear()
    assert begun(admission) == []


def node(name: str, **labels: str) -> Node:
    return Node(name, Resources(cpus=2, gpus=2, memory_bytes=8 * GB), labels)


def placed(admission: Admission, *tasks: Task) -> list[tuple[str, str, tuple[int, ...]]]:
    for item in tasks:
        admission.add(item)
    return [(placement.task.step.name, placement.node, placement.gpus) for placement in admission.begin()]


def test_admission_steps_spread_over_the_nodes_of_their_pool() -> None:
    cluster = spec(default=PoolSpec(cpus=2))
    admission = Admission(cluster, by_pool(cluster, [node("a"), node("b")]))
    found = placed(admission, *[task(str(number)) for number in range(5)])
    assert [where for _, where, _ in found] == ["a", "b", "a", "b"]


def test_admission_steps_of_a_node_get_different_gpus_and_give_them_back() -> None:
    cluster = spec(default=PoolSpec(cpus=8, gpus=2), other=PoolSpec(cpus=8, gpus=2, steps=("calibrate",)))
    admission = Admission(cluster, by_pool(cluster, [node("a")]))
    tasks = [task(f"build{number}", kind=Kind.BUILD, gpus=1) for number in range(3)]
    assert placed(admission, *tasks) == [("build0", "a", (0,)), ("build1", "a", (1,))]
    admission.end(tasks[0].step.digest)
    assert placed(admission) == [("build2", "a", (0,))]


def test_admission_fallback_nodes_are_used_when_the_pools_own_are_full() -> None:
    pool = PoolSpec(cpus=1, labels={"gpu": "L40S"}, fallback=({"gpu": "H100"},))
    cluster = spec(default=pool)
    admission = Admission(cluster, by_pool(cluster, [node("big", gpu="H100"), node("own", gpu="L40S"), node("none")]))
    found = placed(admission, *[task(str(number)) for number in range(3)])
    assert [where for _, where, _ in found] == ["own", "big"]


def test_admission_node_that_does_not_see_the_source_is_left_out() -> None:
    cluster = spec(default=PoolSpec(cpus=2))
    admission = Admission(cluster, by_pool(cluster, [node("a"), node("b")]))
    admission.learn([NodeFacts(node="a", paths={"/source": False}), NodeFacts(node="b", paths={"/source": True})])
    reading = [task(str(number)) for number in range(3)]
    reading = [
        item.model_copy(update={"step": item.step.model_copy(update={"locations": {"source": "/source"}})}) for item in reading
    ]
    assert [where for _, where, _ in placed(admission, *reading)] == ["b", "b"]


def test_by_pool_labels_of_no_node_are_refused_with_what_the_nodes_have() -> None:
    with pytest.raises(ClusterError, match="no node has the labels of pool gpu") as caught:
        by_pool(spec(gpu=PoolSpec(labels={"gpu": "H100"})), [node("a", gpu="L40S")])
    assert "a {'gpu': 'L40S'}" in caught.value.advice


@pytest.mark.parametrize(
    ("condition", "value", "expected"),
    [("H100", "H100", True), ("H100", "L40S", False), ("H100", None, False), ("!H100", "L40S", True), ("!H100", None, True),
     ("in(H100, L40S)", "L40S", True), ("in(H100,L40S)", "A100", False), ("!in(H100,L40S)", "A100", True),
     ("!in(H100)", None, True)],
)  # fmt: skip
def test_selects_as_rays_label_selectors_do(condition: str, value: str | None, expected: bool) -> None:
    assert selects({"gpu": condition}, {} if value is None else {"gpu": value}) is expected


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
    processes.start(task("a"), ())
    found = events.get(timeout=30)
    processes.close()
    assert isinstance(found, StepFailed)
    assert found.failure.kind is FailureKind.INFRASTRUCTURE
