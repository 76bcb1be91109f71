"""The simulation of a plan places every step where a real Ray cluster placed it, when the steps end in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayBed

from actors import RayCluster
from orchestrator.clusters.simulated import SimulatedCluster
from orchestrator.events import Event, StepStarted
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Failure, Kind, Resources, Step
from orchestrator.scheduling.driver import drive
from orchestrator.scheduling.placement import Node, Placed, Placement
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from tests.conftest import SpecMaker
from tests.support.tiny import write_tiny_llama

GB = 10**9
SIZES = (Resources(memory_bytes=2 * GB), Resources(), Resources(cpus=2), Resources(memory_bytes=GB), Resources(memory_bytes=9 * GB))
"""Resources of the steps in turn: two fit on the large node, one anywhere, one fills that node, one must run alone there."""


@pytest.fixture
def nodes() -> Iterator[None]:
    """A head without cores and two nodes of different size: processes of this machine."""
    bed = RayBed(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8})
    for size, cpus in (("large", 2), ("small", 1)):
        bed.add_node(num_cpus=cpus, memory=2 * cpus * GB, object_store_memory=10**8, labels={"size": size})
    ray.init(address=bed.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    bed.shutdown()


class Recorder(Placement):
    """Counts the rounds in which something began or ended: the time of the simulation."""

    def __init__(self, spec: ClusterSpec) -> None:
        super().__init__(spec)
        self.decisions: list[tuple[str, Node]] = []
        self.rounds: dict[str, int] = {}
        """Number of rounds that each step took, by digest."""
        self._round = 0
        self._ended = False

    def begin(self, now: float) -> Iterator[Placed]:
        self._round += self._ended
        self._ended = False
        for placed in super().begin(now):
            self.decisions.append((placed.task.step.name, placed.node))
            self.rounds[placed.task.step.digest] = -self._round
            yield placed

    def end(self, digest: str, now: float, failure: Failure | None = None) -> None:
        super().end(digest, now, failure)
        self.rounds[digest] += self._round + 1
        self._ended = True


class Replay(SimulatedCluster):
    """Takes as many seconds for a step as the real one took rounds."""

    def __init__(self, spec: ClusterSpec, rounds: dict[str, int]) -> None:
        super().__init__(spec)
        self._rounds = rounds
        self.decisions: list[tuple[str, str]] = []

    def _compute_seconds(self, step: Step, pool: str) -> float:
        return self._rounds[step.digest]


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_simulated_steps_go_where_ray_placed_them(tmp_path: Path, make_spec: SpecMaker, store_url: str) -> None:
    source = write_tiny_llama(tmp_path / "source", num_hidden_layers=9)
    made = preparation.plan(make_spec(source, conversion={"max_shard_bytes": "50KB"}))
    converts = list(made.of_kind(Kind.CONVERT))
    sized = [step.model_copy(update={"resources": SIZES[number % len(SIZES)]}) for number, step in enumerate(converts)]
    plan = Plan(made.spec, made.inputs, tuple(sized))
    pool = PoolSpec(labels={"size": "large"}, fallback=({"size": "small"},), steps=("convert",))
    real_spec = ClusterSpec(kind="ray", store=store_url, pools={"large": pool})
    real = RayCluster(real_spec)
    recorder: Any = Recorder(real_spec)
    real._placement = recorder
    try:
        reported = {node.labels["size"]: node for node in real._watch.nodes if node.capacity.cpus}
        assert not drive(plan, {}, real, real_spec, lambda event: None).failures
    finally:
        real.close()

    def pool_of(size: str, **rest: Any) -> PoolSpec:
        has = reported[size].capacity
        return PoolSpec(cpus=has.cpus, memory=has.memory_bytes, labels={"size": size}, **rest)

    pools = {"large": pool_of("large", fallback=pool.fallback, steps=pool.steps), "small": pool_of("small", steps=("verify",))}
    simulated_spec = ClusterSpec(store=store_url, pools=pools)
    simulated = Replay(simulated_spec, recorder.rounds)
    began: list[tuple[str, str]] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepStarted):
            began.append((event.step, event.node))

    drive(plan, {}, simulated, simulated_spec, listen)
    assert began == [(name, f"{node.labels['size']}/0") for name, node in recorder.decisions]
    assert {node for _, node in began} == {"large/0", "small/0"}
    assert len(began) == len(plan.steps) >= 10
