"""What rank 0 of an MPI job sees: test_mpi_cluster.py starts pytest on this file under mpiexec. Its name is no test's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.base.errors import ClusterError
from orchestrator.clusters.mpi import MpiCluster
from orchestrator.events import Event, StepFailed, StepStarted
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Cause, FailureKind, Resources, Task
from orchestrator.scheduling.cluster import Cluster
from orchestrator.scheduling.driver import drive
from orchestrator.spec.cluster import ClusterSpec, PoolSpec, RetrySpec
from tests.contracts.cluster_contract import ClusterContract
from tests.integration.test_real_clusters import conversion, tasks

__all__ = ["conversion", "tasks"]


def place(store: str, **pools: PoolSpec) -> ClusterSpec:
    return ClusterSpec(
        kind="mpi", store=store, pools=pools or {"default": PoolSpec(cpus=1)}, retries=RetrySpec(backoff_seconds=0.05)
    )


class TestMpiCluster(ClusterContract):
    @pytest.fixture
    def cluster(self, store_url: str) -> Iterator[Cluster]:
        opened = MpiCluster(ClusterSpec(kind="mpi", store=store_url))
        yield opened
        opened.close()

    @pytest.fixture
    def two_cores(self, store_url: str) -> Iterator[Cluster]:
        opened = MpiCluster(place(store_url, second=PoolSpec(cpus=2, labels={"role": "second"})))
        yield opened
        opened.close()


class Watcher:
    """Remembers events; kills the process of the first step that starts, when it is told to."""

    def __init__(self, cluster: MpiCluster, *, kill: bool = False) -> None:
        self.cluster = cluster
        self.kill = kill
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.kill and isinstance(event, StepStarted):
            self.kill = False
            node = self.cluster.pids[self.cluster.rank_of(event.digest)]
            (step,) = Path(f"/proc/{node}/task/{node}/children").read_text().split()
            os.kill(int(step), signal.SIGKILL)


def test_step_process_killed_fails_alone_and_is_started_again(conversion: Plan, store_url: str) -> None:
    spec = place(store_url)
    cluster = MpiCluster(spec)
    try:
        watcher = Watcher(cluster, kill=True)
        result = drive(conversion, {}, cluster, spec, watcher)
    finally:
        cluster.close()
    assert not result.failures
    assert set(result.outcomes) == {step.digest for step in conversion.steps}
    (failed,) = [event.failure for event in watcher.events if isinstance(event, StepFailed)]
    assert failed.kind is FailureKind.INFRASTRUCTURE
    assert "SIGKILL" in failed.message
    started = [event for event in watcher.events if isinstance(event, StepStarted)]
    assert len(started) == len(conversion.steps) + 1
    assert len({event.node for event in started}) == 2, "two nodes, and only one was used"
    assert failed.node in {event.node for event in started}


def test_pool_that_no_node_belongs_to_is_refused(store_url: str) -> None:
    with pytest.raises(ClusterError, match="no node has the labels of pool gpu"):
        MpiCluster(place(store_url, gpu=PoolSpec(labels={"ray.io/accelerator-type": "H100"})))


def test_pool_with_more_gpus_than_its_nodes_is_refused(store_url: str) -> None:
    with pytest.raises(ClusterError, match="has 0 GPUs, but pool gpu needs 8"):
        MpiCluster(place(store_url, gpu=PoolSpec(gpus=8)))


def test_step_for_a_gpu_that_no_node_has_ends_with_the_reason(conversion: Plan, store_url: str) -> None:
    wanted = conversion.steps[0].model_copy(update={"resources": Resources(gpus=1)})
    cluster = MpiCluster(ClusterSpec(kind="mpi", store=store_url, schedule_timeout_seconds=0.5))
    try:
        cluster.start(Task(step=wanted, inputs={}, attempt=1, store=store_url))
        (event,) = cluster.events(30.0)
    finally:
        cluster.close()
    assert isinstance(event, StepFailed)
    assert event.failure.cause is Cause.PLACE
    assert "has 0 GPUs" in event.failure.message


def test_probe_every_node_answers_for_itself(store_url: str, tmp_path: Path) -> None:
    cluster = MpiCluster(place(store_url))
    try:
        facts = cluster.probe([str(tmp_path), str(tmp_path / "nowhere")])
    finally:
        cluster.close()
    assert len({node.node for node in facts}) == 2
    assert sorted(node.labels.get("role", "") for node in facts) == ["", "second"]
    for node in facts:
        assert (node.error, node.store_error) == ("", "")
        assert node.paths == {str(tmp_path): True, str(tmp_path / "nowhere"): False}
        assert node.cpus >= 1
        assert node.versions["mpi4py"]


def test_pool_of_a_label_from_the_environment_gets_that_node_alone(conversion: Plan, store_url: str) -> None:
    spec = place(store_url, second=PoolSpec(cpus=2, labels={"role": "second"}))
    cluster = MpiCluster(spec)
    try:
        watcher = Watcher(cluster)
        drive(conversion, {}, cluster, spec, watcher)
    finally:
        cluster.close()
    assert {event.node.rpartition("/")[2] for event in watcher.events if isinstance(event, StepStarted)} == {"2"}
