"""SmolLM2-135M at every topology of docs/benchmarks.md: what float32 execution of the ranks' graphs differs from transformers.

    python -m benchmarks.verification [--model DIR] [--store DIR]

Converts and verifies, builds no engine. A committed step is not repeated, so the second run only prints.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.clusters.local import LocalCluster
from orchestrator.events import silent
from orchestrator.planning import preparation
from orchestrator.planning.facts import Verification
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind
from orchestrator.scheduling import commits, execute
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store

TOPOLOGIES = ((1, 1), (3, 1), (1, 2), (3, 2))


def main() -> None:
    """Verify each topology and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--store", type=Path, default=Path(".cache/verification"))
    arguments = parser.parse_args()
    table = Table("tp", "pp", "positions", "max relative error", "max absolute error", "mean KL", "top-1", box=None)
    for tp, pp in TOPOLOGIES:
        found = verify(arguments.model, tp, pp, arguments.store.resolve().as_uri())
        table.add_row(
            str(tp), str(pp), str(found.num_positions), f"{found.max_relative_error:.1e}", f"{found.max_absolute_error:.1e}",
            f"{found.mean_kl:.1e}", f"{found.top1_agreement:.3f}",
        )  # fmt: skip
    Console(width=120).print(table)


def verify(model: Path, tp: int, pp: int, store: str) -> Verification:
    """Run everything but the builds of one topology. Raises VerificationError."""
    spec = decode(
        BuildSpec,
        {"source": {"path": str(model.resolve())}, "topology": {"tp": tp, "pp": pp}, "release": {"name": "none", "version": "0"}},
        "benchmark",
    )
    made = preparation.plan(spec)
    only = Plan(made.spec, made.inputs, tuple(step for step in made.steps if step.kind is not Kind.BUILD))
    committed = commits.committed(open_store(store), (step.digest for step in only.steps))
    result = execute.execute(only, committed, ClusterSpec(store=store), LocalCluster, silent)
    result.raise_failures(only)
    last = list(only.of_kind(Kind.VERIFY))[-1]
    return result.outcomes[last.digest].facts.verification


if __name__ == "__main__":
    main()
