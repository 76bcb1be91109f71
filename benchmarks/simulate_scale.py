"""A build of 64 ranks x 126 layers (a 405B-shaped Llama, tp=8, pp=8) simulated on 8 nodes: seconds and memory of a fresh process.

    python -m benchmarks.simulate_scale [--folder DIR] [--rounds N]

Planned from headers with a conversion task per layer, driven by the real driver: four CPU nodes convert and verify, 32 GPUs of
four nodes build, one build is lost once. The figures of the build itself follow from the rates below: stated, not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.sources import write_llama

_CHILD = """
import json, resource, sys, time
began = time.monotonic()
from orchestrator.clusters import simulation
from orchestrator.planning import preparation
from orchestrator.spec.rates import RatesSpec
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
imported = time.monotonic()
given = json.loads(sys.argv[1])
made = preparation.plan(decode(BuildSpec, given["spec"], "benchmark"))
planned = time.monotonic()
place, rates = decode(ClusterSpec, given["cluster"], "benchmark"), decode(RatesSpec, given["rates"], "benchmark")
found = simulation.simulate(made, place, rates, simulation.parse_failures(given["fail"], made))
ended = time.monotonic()
assert not found.failures and found.retries == len(given["fail"])
print(json.dumps({
    "import_seconds": imported - began, "plan_seconds": planned - imported, "simulate_seconds": ended - planned,
    "steps": len(made.steps), "ranks": made.topology.world_size, "attempts": len(found.spans),
    "layers": made.inputs.config.num_hidden_layers, "makespan_seconds": found.makespan_seconds,
    "critical_seconds": found.critical_seconds, "cost": found.cost, "store_read_bytes": found.links["store/read"].num_bytes,
    "utilization": {name: pool.utilization for name, pool in found.pools.items()},
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""

CLUSTER = {
    "store": "memory://none",
    "pools": {
        "h100": {"nodes": 4, "cpus": 16, "gpus": 8, "memory": "2TB", "steps": ["build"]},
        "cpu": {"nodes": 4, "cpus": 32, "memory": "4TB"},
    },
}
RATES = {
    "store_read": "100GB",
    "pools": {
        "h100": {"network": "12.5GB", "price_per_hour": 98.0},
        "cpu": {"network": "6.25GB", "price_per_hour": 6.0},
    },
}


def main() -> None:
    """Write the headers, simulate in processes of their own, print the median round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source = arguments.folder / "llama-405b-headers"
    write_llama(source, num_files=191, hidden=16384, inter=53248, heads=128, kv_heads=8, layers=126, vocab=128256, sparse=True)
    spec = {
        "source": {"path": str(source.resolve())}, "topology": {"tp": 8, "pp": 8}, "conversion": {"max_shard_bytes": "1GB"},
        "engine": {"backend": "tensorrt", "max_seq_len": 8192}, "release": {"name": "bench", "version": "1"},
    }  # fmt: skip
    given = {"spec": spec, "cluster": CLUSTER, "rates": RATES, "fail": ["build/rank3:1"]}
    rounds = sorted((simulate(given) for _ in range(arguments.rounds)), key=lambda found: float(found["simulate_seconds"]))
    found = rounds[len(rounds) // 2]
    assert len({item["makespan_seconds"] for item in rounds}) == 1, "the simulation is not the same each time"
    print(f"{found['ranks']} ranks x {found['layers']} layers: {found['steps']} steps, {found['attempts']} attempts")
    print(f"seconds to simulate               {found['simulate_seconds']:8.2f}      (goal 10; to plan {found['plan_seconds']:.2f})")
    print(f"peak memory of the process        {found['peak_bytes'] / 1e6:8.0f} MB")
    print(
        f"simulated: makespan {found['makespan_seconds']:,.0f} s, critical path {found['critical_seconds']:,.0f} s, "
        f"{found['store_read_bytes'] / 1e12:.2f} TB read, cost {found['cost']:,.0f}, slots busy "
        + ", ".join(f"{name} {share:.0%}" for name, share in found["utilization"].items())
    )


def simulate(given: dict[str, Any]) -> dict[str, Any]:
    """One round: what the process measured of itself."""
    words = [sys.executable, "-c", _CHILD, json.dumps(given)]
    found: dict[str, Any] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    return found


if __name__ == "__main__":
    main()
