"""The demo handed over to three real Ray nodes: `python -m benchmarks.three_nodes` (`make demo-cluster`).

Each node has network, processes and shared memory of its own on this machine (tests/support/ray_nodes.py; needs root). SmolLM2 at
tp=3, pp=2 goes through `orchestrator submit --follow`, as from any machine that reaches the head; the driver is on a worker. Fails
unless convert steps ran on several nodes and the set was published.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from orchestrator.planning.steps import Kind, Outcome
from orchestrator.scheduling import commits
from orchestrator.spec.loading import load_spec
from orchestrator.stores import open_store
from tests.support.ray_nodes import BedOptions, RayNodes, ray_nodes, skip_reason
from tests.support.smollm2 import smollm2

SPEC = Path(__file__).resolve().parents[1] / "cluster_configs" / "jobs" / "smollm2.yaml"
SHARD_BYTES = 20_000_000
"""Of the ranks' shards: small, so that there is more than one convert step for each node."""


def main() -> None:
    """Run the demo and print where its steps ran."""
    reason = skip_reason()
    if reason is not None:
        sys.exit(f"three nodes cannot be made here: {reason}")
    smollm2()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ray_nodes(BedOptions(scratch_bytes=2 * 2**30)) as bed:
        print(f"three nodes up after {time.monotonic() - began:.0f} s; the head's dashboard is {bed.dashboard}", flush=True)
        words = submission(bed, Path(temporary))
        print("$ " + " ".join(words), flush=True)
        environment = {**os.environ, **bed.environment}
        done = subprocess.run([sys.executable, "-m", "orchestrator.cli", *words[1:]], env=environment)
        if done.returncode:
            sys.exit(done.returncode)
        nodes = {outcome.node for outcome in outcomes(bed) if outcome.kind is Kind.CONVERT}
        print(f"convert steps ran on {len(nodes)} nodes: {', '.join(sorted(nodes))}; {time.monotonic() - began:.0f} s in all")
        if len(nodes) < 2:
            sys.exit("convert steps did not spread")


def submission(bed: RayNodes, folder: Path) -> list[str]:
    """The command, with its files."""
    spec = load_spec(SPEC).model_dump(mode="json", exclude_unset=True)
    spec["conversion"] = {"max_shard_bytes": SHARD_BYTES}
    cluster = {
        "kind": "ray", "store": bed.store_url, "scratch": str(bed.scratch), "driver": {"cpus": 0.1, "labels": {"role": "worker"}},
    }  # fmt: skip
    for name, value in {"spec.yaml": spec, "cluster.yaml": cluster}.items():
        (folder / name).write_text(yaml.safe_dump(value, sort_keys=False))
    files = [str(folder / "spec.yaml"), "--cluster", str(folder / "cluster.yaml")]
    return ["orchestrator", "submit", *files, "--address", bed.dashboard, "--follow"]


def outcomes(bed: RayNodes) -> list[Outcome]:
    """Of every step that was committed."""
    store = open_store(bed.store_url)
    digests = [found.key.removeprefix(commits.OUTCOMES).removesuffix(".json") for found in store.list(commits.OUTCOMES)]
    return [outcome for digest in digests if (outcome := commits.lookup(store, digest)) is not None]


if __name__ == "__main__":
    main()
