"""The cluster contract where steps really run: processes of this machine, and actors of a Ray cluster."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import RayCluster
from actors.step_actor import ConvertActor
from orchestrator import building
from orchestrator.base.errors import ClusterError, ToolError
from orchestrator.clusters.local import LocalCluster
from orchestrator.events import Event, StepFailed, StepStarted, StepSucceeded
from orchestrator.planning import preparation
from orchestrator.planning.places import with_offered_gpus
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Cause, FailureKind, Kind, Resources, Task
from orchestrator.scheduling.cluster import Cluster
from orchestrator.scheduling.driver import drive
from orchestrator.scheduling.placement import Node
from orchestrator.spec.cluster import ClusterSpec, PoolSpec, RetrySpec
from tests.conftest import SpecMaker
from tests.contracts.cluster_contract import ClusterContract, ContractTasks

RETRIES = RetrySpec(max_attempts=3, backoff_seconds=0.05)


@pytest.fixture
def conversion(tiny_llama: Path, make_spec: SpecMaker) -> Plan:
    """Several convert steps of a tiny model that need nothing."""
    made = preparation.plan(make_spec(tiny_llama, conversion={"max_shard_bytes": "100KB"}))
    return Plan(made.spec, made.inputs, tuple(made.of_kind(Kind.CONVERT)))


@pytest.fixture
def tasks(conversion: Plan, store_url: str, tmp_path: Path) -> ContractTasks:
    made = [Task(step=step, inputs={}, attempt=1, store=store_url) for step in conversion.steps]
    lost = made[0].step.model_copy(update={"locations": {"source": str(tmp_path / "nowhere")}, "version": 99})
    return ContractTasks(tuple(made[1:4]), made[0].model_copy(update={"step": lost}))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One Ray for the module: starting it takes seconds."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=10**8)
    yield
    ray.shutdown()


class TestLocalCluster(ClusterContract):
    @pytest.fixture
    def cluster(self, store_url: str) -> Iterator[Cluster]:
        opened = LocalCluster(ClusterSpec(store=store_url))
        yield opened
        opened.close()

    @pytest.fixture
    def two_cores(self, store_url: str) -> Iterator[Cluster]:
        opened = LocalCluster(ClusterSpec(store=store_url, pools={"default": PoolSpec(cpus=2)}))
        yield opened
        opened.close()


@pytest.mark.usefixtures("ray_session")
class TestRayCluster(ClusterContract):
    @pytest.fixture
    def cluster(self, store_url: str) -> Iterator[Cluster]:
        opened = RayCluster(ClusterSpec(kind="ray", store=store_url))
        yield opened
        opened.close()

    @pytest.fixture
    def two_cores(self, cluster: Cluster) -> Cluster:
        return cluster  # as many as the session has


class Killer:
    """Does away with the worker of the first step that starts."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.victim = ""
        self.attempts: list[tuple[str, int]] = []

    def __call__(self, event: Event) -> None:
        if not isinstance(event, StepStarted):
            return
        self.attempts.append((event.digest, event.attempt))
        if not self.victim:
            self.victim = event.digest
            self.kill(event.digest)

    def kill(self, digest: str) -> None:
        os.kill(self.cluster.processes.pid(digest), signal.SIGKILL)


class ActorKiller(Killer):
    def kill(self, digest: str) -> None:
        attempts = self.cluster._attempts.values()
        ray.kill(next(attempt.worker.actor for attempt in attempts if attempt.placed.task.step.digest == digest))


def drive_with(killer: Killer, plan: Plan, store: str) -> None:
    result = drive(plan, {}, killer.cluster, ClusterSpec(store=store, retries=RETRIES), killer)
    assert not result.failures
    assert set(result.outcomes) == {step.digest for step in plan.steps}
    assert (killer.victim, 2) in killer.attempts
    assert len(killer.attempts) == len(plan.steps) + 1


def test_local_worker_killed_is_started_again(conversion: Plan, store_url: str) -> None:
    cluster = LocalCluster(ClusterSpec(store=store_url))
    try:
        drive_with(Killer(cluster), conversion, store_url)
    finally:
        cluster.close()


@pytest.mark.usefixtures("ray_session")
def test_ray_actor_killed_is_started_again(conversion: Plan, store_url: str) -> None:
    cluster = RayCluster(ClusterSpec(kind="ray", store=store_url))
    try:
        drive_with(ActorKiller(cluster), conversion, store_url)
    finally:
        cluster.close()


class Leaving:
    """Stands for NodeWatch: the one real node is being taken back, and there is said to be another."""

    def __init__(self, node: Node) -> None:
        other = replace(node, node_id="f" * len(node.node_id), name="other")
        self.nodes = (replace(node, leaves_at=time.time()), other)
        self.drained = {node.node_id}

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("ray_session")
def test_ray_step_on_a_node_that_leaves_too_soon_is_handed_over(
    tiny_llama: Path, make_spec: SpecMaker, store_url: str, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    step = next(preparation.plan(make_spec(source)).of_kind(Kind.CONVERT))
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")  # whoever opens it waits
    cluster = RayCluster(ClusterSpec(kind="ray", store=store_url))
    try:
        cluster.start(Task(step=step, inputs={}, attempt=1, store=store_url))
        events = [*cluster.events(30.0)]
        assert [event.event for event in events] == ["started"]
        (node,) = cluster._watch.nodes
        cluster._watch.close()
        cluster._watch = Leaving(node)  # type: ignore[assignment]
        (event,) = cluster.events(30.0)
    finally:
        cluster.close()
    assert isinstance(event, StepFailed)
    assert (event.failure.kind, event.failure.cause) == (FailureKind.HANDED_OVER, Cause.DRAIN)
    assert "too soon for this step" in event.failure.message


@pytest.mark.usefixtures("ray_session")
def test_ray_step_for_a_gpu_that_nobody_has_ends_with_the_reason(conversion: Plan, store_url: str) -> None:
    wanted = conversion.steps[0].model_copy(update={"resources": Resources(gpus=2)})
    cluster = RayCluster(ClusterSpec(kind="ray", store=store_url, schedule_timeout_seconds=0.5))
    try:
        cluster.start(Task(step=wanted, inputs={}, attempt=1, store=store_url))
        (event,) = cluster.events(30.0)
    finally:
        cluster.close()
    assert isinstance(event, StepFailed)
    assert event.failure.kind is FailureKind.APPLICATION
    assert isinstance(event.failure.to_error("convert"), ClusterError)
    assert "it asks for 1 CPU, 2 GPU; the nodes: " in event.failure.message
    assert "has 1 GPUs" in event.failure.message


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("gpus", "together"), [(1, 1), (0, 2)])
def test_ray_steps_of_device_auto_take_turns_on_the_pools_gpu(conversion: Plan, store_url: str, gpus: int, together: int) -> None:
    """The node says that it has a GPU, so nothing here needs one. Without GPUs in the pool both steps run at once."""
    steps = [
        step.model_copy(update={"locations": {**step.locations, "device": "auto"}, "resources": Resources()})
        for step in conversion.steps[:2]
    ]
    place = ClusterSpec(kind="ray", store=store_url, pools={"default": PoolSpec(cpus=2, gpus=gpus)})
    cluster, held, done = RayCluster(place), [], 0
    try:
        for step in with_offered_gpus(replace(conversion, steps=tuple(steps)), place).steps:
            cluster.start(Task(step=step, inputs={}, attempt=1, store=store_url))
        while done < len(steps):
            for event in cluster.events(30.0):
                assert not isinstance(event, StepFailed), event
                done += isinstance(event, StepSucceeded)
                held.append(len(cluster._placement.running))
    finally:
        cluster.close()
    assert max(held) == together


@pytest.mark.usefixtures("ray_session")
def test_ray_idle_worker_takes_the_next_step_of_its_kind(conversion: Plan, store_url: str) -> None:
    cluster = RayCluster(ClusterSpec(kind="ray", store=store_url, pools={"default": PoolSpec(cpus=1)}))
    seen = set()
    try:
        for step in conversion.steps[:3]:
            alike = step.model_copy(update={"resources": Resources()})
            cluster.start(Task(step=alike, inputs={}, attempt=1, store=store_url))
            while not any(isinstance(event, StepSucceeded) for event in cluster.events(30.0)):
                pass
            (worker,) = cluster._workers._all
            seen.add(worker.actor)
    finally:
        cluster.close()
    assert len(seen) == 1


def test_actor_given_another_kind_of_step_refuses_it(conversion: Plan, store_url: str) -> None:
    step = conversion.steps[0].model_copy(update={"kind": Kind.BUILD})
    with pytest.raises(ToolError, match="ConvertActor does not run build steps"):
        next(ConvertActor().run(Task(step=step, inputs={}, attempt=1, store=store_url).model_dump_json()))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_build_on_ray_publishes_what_a_local_build_publishes(tiny_llama: Path, tmp_path: Path, make_spec: SpecMaker) -> None:
    spec = make_spec(tiny_llama, topology={"tp": 2, "pp": 2})
    on_ray = ClusterSpec(kind="ray", store=(tmp_path / "ray").as_uri())
    locally = ClusterSpec(store=(tmp_path / "local").as_uri())
    first = building.build(spec, on_ray, open_cluster=RayCluster)
    second = building.build(spec, locally)
    assert first.manifest.build_key == second.manifest.build_key
    assert first.result is not None
    assert second.result is not None
    for step in first.plan.of_kind(Kind.CONVERT):
        ours, theirs = first.result.outcomes[step.digest], second.result.outcomes[step.digest]
        assert [output.sha256 for output in ours.outputs] == [output.sha256 for output in theirs.outputs]
    assert first.manifest.verification == second.manifest.verification
