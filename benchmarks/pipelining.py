"""Whether steps overlap as the plan allows: the demo, or another build, on a Ray cluster of this machine.

    python -m benchmarks.pipelining [--spec SPEC] [--source DIR] [--cpus N] [--algorithm FP8]

Prints when the first engine began and when the last convert ended, and the makespan beside two others: the critical path on these
slots, which is the shortest schedule found for whole steps that start in no time; and what no schedule can go below, be steps
divisible or not: the longest chain of steps, and all work shared evenly by the slots. Seconds are those that the steps took in
this very build.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from actors import RayCluster
from orchestrator import building
from orchestrator.events import Event, StepStarted, StepSucceeded
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.spec.build import QuantizationSpec, SourceSpec
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.spec.loading import load_spec

_NUM_ORDERS = 10_000


class Clock:
    """When steps began and ended, here."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Take the time of a start or an end."""
        if isinstance(event, StepStarted):
            self.began.setdefault(event.digest, time.monotonic())
        elif isinstance(event, StepSucceeded):
            self.ended[event.digest] = time.monotonic()


def longest_chain(plan: Plan, seconds: dict[str, float]) -> float:
    """Of steps that need each other."""
    until: dict[str, float] = {}
    for step in plan.steps:
        until[step.digest] = max((until[need] for need in step.needs), default=0.0) + seconds[step.digest]
    return max(until.values())


def shortest_schedule(plan: Plan, seconds: dict[str, float], cores: dict[str, int], slots: int) -> float:
    """The least makespan over random orders of priority, in each of which a step that fits passes one that does not."""
    order = [step.digest for step in plan.steps]
    needs = {step.digest: set(step.needs) for step in plan.steps}
    chance = random.Random(0)
    best = _makespan(order, needs, seconds, cores, slots)
    for _ in range(_NUM_ORDERS):
        chance.shuffle(order)
        best = min(best, _makespan(order, needs, seconds, cores, slots))
    return best


def _makespan(order: list[str], needs: dict[str, set[str]], seconds: dict[str, float], cores: dict[str, int], slots: int) -> float:
    waiting, running, done = list(order), dict[str, float](), set[str]()
    now = 0.0
    while waiting or running:
        for digest in list(waiting):
            if needs[digest] <= done and sum(cores[each] for each in running) + cores[digest] <= slots:
                waiting.remove(digest)
                running[digest] = now + seconds[digest]
        ended = min(running, key=running.__getitem__)
        now = running.pop(ended)
        done.add(ended)
    return now


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, default=Path("cluster_configs/jobs/smollm2.yaml"))
    parser.add_argument("--source", type=Path, help="Instead of the one that the spec names.")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument(
        "--algorithm", help="Quantize: the stages' converts then wait for calibrations that go one after the other."
    )
    options = parser.parse_args()
    spec = load_spec(options.spec)
    if options.source is not None:
        spec = spec.model_copy(update={"source": SourceSpec(path=str(options.source.resolve()))})
    if options.algorithm is not None:
        spec = spec.model_copy(update={"quantization": QuantizationSpec(algorithm=options.algorithm)})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        place = ClusterSpec(kind="ray", store=Path(folder).as_uri(), pools={"default": PoolSpec(cpus=options.cpus)})
        plan = building.build(spec, place, open_cluster=RayCluster, listener=clock).plan
    seconds = {digest: clock.ended[digest] - clock.began[digest] for digest in clock.ended}
    cores = {step.digest: min(step.resources.cpus, options.cpus) for step in plan.steps}
    zero = min(clock.began.values())
    first_engine = min(clock.began[step.digest] for step in plan.of_kind(Kind.BUILD)) - zero
    last_convert = max(clock.ended[step.digest] for step in plan.of_kind(Kind.CONVERT)) - zero
    makespan = max(clock.ended.values()) - zero
    chain, share = longest_chain(plan, seconds), sum(seconds[digest] * cores[digest] for digest in seconds) / options.cpus
    bound, shortest = max(chain, share), shortest_schedule(plan, seconds, cores, options.cpus)
    print(f"{len(plan.steps)} steps, {sum(1 for _ in plan.of_kind(Kind.CONVERT))} of them converts, {options.cpus} slots")
    print(f"  first engine began at {first_engine:.1f} s, last convert ended at {last_convert:.1f} s")
    print(f"  makespan {makespan:.1f} s: {makespan / shortest:.2f} of the critical path on these slots, {shortest:.1f} s,")
    print(f"  {makespan / bound:.2f} of max(longest chain {chain:.1f} s, work per slot {share:.1f} s)")


if __name__ == "__main__":
    main()
