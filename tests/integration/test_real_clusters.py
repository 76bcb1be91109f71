"""The cluster contract where steps really run: processes of this machine, and actors of a Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import RayCluster
from actors.convert_actor import ConvertActor
from orchestrator import verbs
from orchestrator.clusters import AnyEvent, Cluster
from orchestrator.clusters.local import LocalCluster
from orchestrator.core.errors import ToolError
from orchestrator.core.plan import Plan
from orchestrator.core.spec import ClusterSpec, RetrySpec
from orchestrator.core.step import Kind, Task
from orchestrator.driver import drive
from orchestrator.report import SilentListener
from tests.conftest import SpecMaker
from tests.contracts.cluster_contract import ClusterContract, ContractTasks

RETRIES = RetrySpec(max_attempts=3, backoff_seconds=0.05)


@pytest.fixture
def conversion(tiny_llama: Path, make_spec: SpecMaker) -> Plan:
    """Several convert steps of a tiny model that need nothing."""
    made = verbs.plan(make_spec(tiny_llama, conversion={"max_shard_bytes": "100KB"}))
    return Plan(made.spec, made.inputs, tuple(made.of_kind(Kind.CONVERT)))


@pytest.fixture
def tasks(conversion: Plan, store_url: str, tmp_path: Path) -> ContractTasks:
    made = [Task(step=step, inputs={}, attempt=1, store=store_url) for step in conversion.steps]
    lost = made[0].step.model_copy(update={"places": {"source": str(tmp_path / "nowhere")}, "version": 99})
    return ContractTasks(tuple(made[1:4]), made[0].model_copy(update={"step": lost}))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One Ray for the module: starting it takes seconds."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=10**8)
    yield
    ray.shutdown()


class TestLocalCluster(ClusterContract):
    @pytest.fixture
    def cluster(self, store_url: str) -> Iterator[Cluster]:
        opened = LocalCluster(ClusterSpec(store=store_url))
        yield opened
        opened.close()


@pytest.mark.usefixtures("ray_session")
class TestRayCluster(ClusterContract):
    @pytest.fixture
    def cluster(self, store_url: str) -> Iterator[Cluster]:
        opened = RayCluster(ClusterSpec(kind="ray", store=store_url))
        yield opened
        opened.close()


class Killer(SilentListener):
    """Does away with the worker of the first step that starts."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.victim = ""
        self.attempts: list[tuple[str, int]] = []

    def on_event(self, event: AnyEvent) -> None:
        if event.type != "started":
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
    first = verbs.build(spec, on_ray, open_cluster=RayCluster)
    second = verbs.build(spec, locally)
    assert first.manifest.build_key == second.manifest.build_key
    assert first.result is not None
    assert second.result is not None
    for step in first.plan.of_kind(Kind.CONVERT):
        ours, theirs = first.result.outcomes[step.digest], second.result.outcomes[step.digest]
        assert [output.sha256 for output in ours.outputs] == [output.sha256 for output in theirs.outputs]
    assert first.manifest.verification == second.manifest.verification
