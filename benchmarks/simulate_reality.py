"""The simulation against a real build: SmolLM2-135M at tp=3, pp=2, as processes of this machine.

    python -m benchmarks.simulate_reality [--source DIR] [--folder DIR]

Step rates are measured by a build of another topology (tp=3, pp=1) on the same machine; with them the second build is simulated
before it runs. Printed: both makespans and their ratio, and what the default rates and its own rates say.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from orchestrator import building
from orchestrator.clusters import simulation
from orchestrator.events import Event
from orchestrator.planning import preparation
from orchestrator.scheduling import commits
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.spec.rates import RatesSpec
from orchestrator.stores import open_store


class Clock:
    """When the first step started and the last one ended."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def __call__(self, event: Event) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last


def spec_of(source: Path, pp: int) -> BuildSpec:
    """The demo's spec at another number of stages."""
    plain = {
        "source": {"path": str(source.resolve())}, "topology": {"tp": 3, "pp": pp},
        "engine": {"max_batch_size": 4, "max_input_len": 256, "max_seq_len": 1024},
        "release": {"name": "smollm2", "version": f"pp{pp}"},
    }  # fmt: skip
    return decode(BuildSpec, plain, "benchmark")


def build(spec: BuildSpec, place: ClusterSpec) -> tuple[float, RatesSpec]:
    """Build it; returns the makespan of its steps in seconds, and the rates that they showed."""
    clock = Clock()
    made = building.build(spec, place, listener=clock)
    committed = commits.committed(open_store(place.store), (step.digest for step in made.plan.steps))
    return clock.last - clock.first, RatesSpec.model_validate({"steps": simulation.measured(made.plan, committed)})


def main() -> None:
    """Measure, predict, build, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench/reality"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    places = [ClusterSpec(store=(arguments.folder.resolve() / name).as_uri()) for name in ("measured", "predicted")]
    spec = spec_of(arguments.source, pp=2)
    made = preparation.plan(spec)
    _, rates = build(spec_of(arguments.source, pp=1), places[0])
    predicted = simulation.simulate(made, places[1], rates).makespan_seconds
    real, own = build(spec, places[1])
    print(f"built in {real:.1f} s; predicted {predicted:.1f} s from the rates of another topology: {predicted / real:.2f}")
    for name, other in (("the default rates", RatesSpec()), ("its own rates", own)):
        seconds = simulation.simulate(made, places[1], other).makespan_seconds
        print(f"from {name}: {seconds:.1f} s: {seconds / real:.2f}")


if __name__ == "__main__":
    main()
