"""What a step costs beside its work: 1,000 trivial steps through the driver and a Ray cluster of this machine.

    python -m benchmarks.overhead [--steps N] [--cpus N]

A trivial step is one whose outcome is in the store already when its worker looks: it is placed, sent, started, looked up, reported
and taken in like any other. Beside it, in the same run, the same number of plain Ray tasks and of calls to plain actors.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray

from actors import RayCluster
from orchestrator.events import silent
from orchestrator.planning.plan import Plan
from orchestrator.scheduling import commits
from orchestrator.scheduling.driver import drive
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.stores import open_store
from tests.support.plans import fake_plan, outcome_of


@dataclass(frozen=True)
class Measured:
    """Of all steps together."""

    name: str
    seconds: float
    cpu_seconds: float
    """Of this process, the driver."""


def measured(name: str, work: Callable[[], None]) -> Measured:
    """Seconds and CPU seconds of a call."""
    began, cpu = time.monotonic(), time.process_time()
    work()
    return Measured(name, time.monotonic() - began, time.process_time() - cpu)


def prepared(count: int, folder: Path) -> tuple[Plan, str]:
    """A plan of steps that need nothing, and a store where all their outcomes are."""
    plan = fake_plan({f"step{number}": [] for number in range(count)}, memory_bytes=10**6)
    store = open_store((folder / "store").as_uri())
    for step in plan.steps:
        commits.commit(store, outcome_of(step))
    return plan, store.url


def through_driver(plan: Plan, spec: ClusterSpec) -> None:
    """Drive the plan from nothing, workers and all."""
    cluster = RayCluster(spec)
    try:
        result = drive(plan, {}, cluster, spec, silent)
    finally:
        cluster.close()
    assert len(result.outcomes) == len(plan.steps), result.failures


def plain_tasks(count: int) -> None:
    """Ray tasks that do nothing."""
    nothing = ray.remote(lambda: None)
    ray.get([nothing.remote() for _ in range(count)])


class Nothing:
    """A plain actor."""

    def call(self) -> None:
        """Do nothing."""


def plain_actors(count: int, actors: int) -> None:
    """Calls to as many actors as there are slots."""
    made = [ray.remote(Nothing).remote() for _ in range(actors)]
    ray.get([made[number % actors].call.remote() for number in range(count)])
    for actor in made:
        ray.kill(actor)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    count = options.steps
    with tempfile.TemporaryDirectory() as folder:
        plan, store = prepared(count, Path(folder))
        spec = ClusterSpec(kind="ray", store=store, pools={"default": PoolSpec(cpus=options.cpus)})
        ray.init(
            num_cpus=options.cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=10**8
        )
        try:
            plain_tasks(options.cpus)  # their workers start once
            rows = [
                measured("driver and cluster", lambda: through_driver(plan, spec)),
                measured("plain Ray tasks", lambda: plain_tasks(count)),
                measured("calls to plain actors", lambda: plain_actors(count, options.cpus)),
            ]
        finally:
            ray.shutdown()
    print(f"{count} trivial steps, {options.cpus} slots")
    for row in rows:
        print(f"  {row.name:24} {row.seconds:7.2f} s  {row.cpu_seconds / count * 1e3:6.2f} ms of driver CPU per step")
    ours, tasks, calls = rows
    print(f"  ours / tasks {ours.seconds / tasks.seconds:.1f}, ours / actor calls {ours.seconds / calls.seconds:.1f}")


if __name__ == "__main__":
    main()
