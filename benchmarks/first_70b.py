"""Needs of a first 70B, from headers alone: the plan of a Llama-3-70B-shaped model at tp=8, and its simulation on one 8-GPU node.

    python -m benchmarks.first_70b [--folder DIR] [--cluster CLUSTER]

The checkpoint holds headers and holes: 141 GB by size, megabytes on disk. The seconds are those of the default rates, which
are guesses for GPU steps until `orchestrator rates` has seen a build on your machines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orchestrator
from benchmarks.sources import write_llama
from orchestrator.clusters import simulation
from orchestrator.planning.steps import Kind
from orchestrator.report import format_bytes
from orchestrator.spec.rates import RatesSpec

CLUSTER = Path(__file__).resolve().parents[1] / "cluster_configs/node-8gpu.yaml"


def main() -> None:
    """Write the headers, then print the plan's totals and the simulation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    arguments = parser.parse_args()
    spec = write_spec(arguments.folder)
    for line in totals(orchestrator.plan(orchestrator.load_spec(spec))):
        print(line, flush=True)
    words = [sys.executable, "-m", "orchestrator.cli", "plan", str(spec), "--simulate", "--cluster", str(arguments.cluster)]
    subprocess.run(words, check=True)


def write_spec(folder: Path) -> Path:
    """Write headers and holes of the model, and a spec, to `folder`; returns the spec."""
    source = folder / "llama-70b-headers"
    write_llama(source, num_files=30, hidden=8192, inter=28672, heads=64, kv_heads=8, layers=80, vocab=128256, sparse=True)
    spec = folder / "llama-70b.yaml"
    plain = {
        "source": {"path": str(source.resolve())}, "topology": {"tp": 8},
        "engine": {"backend": "tensorrt", "max_batch_size": 16, "max_input_len": 4096, "max_seq_len": 8192},
        "release": {"name": "llama-70b", "version": "1"},
    }  # fmt: skip
    spec.write_text(json.dumps(plain))
    return spec


def totals(plan: orchestrator.Plan) -> Iterator[str]:
    """Return what the steps of each kind move and take, and what the store holds in the end."""
    yield f"source {format_bytes(plan.inputs.index.num_bytes)}; {len(plan.steps)} steps"
    for kind in Kind:
        steps = list(plan.of_kind(kind))
        if steps:
            read = format_bytes(sum(step.estimate.read_bytes for step in steps))
            written = format_bytes(sum(step.estimate.write_bytes for step in steps))
            memory = format_bytes(max(step.resources.memory_bytes for step in steps))
            yield f"{kind.value:<10} {len(steps):>3} steps  read {read:>9}  write {written:>9}  memory of one {memory:>9}"
    yield f"store: {format_bytes(sum(step.estimate.write_bytes for step in plan.steps))}"
    found = simulation.simulate(plan, orchestrator.load_cluster(CLUSTER), RatesSpec(), {})
    memory = format_bytes(sum(pool.peak_memory_bytes for pool in found.pools.values()))
    yield f"one 8-GPU node, simulated: {found.makespan_seconds / 60:.0f} minutes, steps reserve at most {memory} of memory"


if __name__ == "__main__":
    main()
