"""Reference and verification on the CPU and on a GPU, in one run: seconds, memory and the largest difference.

    python -m benchmarks.verification_gpu [--layers 32] [--tp 2] [--threads 16] [--folder DIR]

The model is the seeded Llama of the 8B's width of benchmarks.proof. Everything is computed in float32, with TF32 off.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from benchmarks.proof import WIDTHS, spec_of, write_source
from orchestrator.planning import preparation
from orchestrator.planning.facts import VerifyFacts
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.spec.build import BuildSpec
from tests.support.peaks import Measured, run_apart


def main() -> None:
    """Convert once, prove on both devices, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(".cache/proof"))
    arguments = parser.parse_args()
    folder = arguments.folder / f"8b-layers{arguments.layers}"
    if not (folder / "source/config.json").is_file():
        write_source(folder / "source", WIDTHS["8b"], arguments.layers)
    spec = spec_of(folder / "source", arguments.tp, 1)
    converted = folder / "converted"
    outcomes: dict[str, Outcome] = {}
    for step in preparation.plan(spec).of_kind(Kind.CONVERT):
        outcomes[step.digest] = run_apart(step, outcomes, converted.resolve().as_uri()).outcome
    table = Table("device", "reference s", "verification s", "peak of both", "relative error", "largest layer error", box=None)
    logits = {}
    for device, threads in (("cpu", arguments.threads), ("cuda", 2)):
        store = folder / device
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(converted, store, copy_function=os.link)
        reference, verified = prove(spec, device, dict(outcomes), store, threads)
        facts = verified.outcome.facts_as(VerifyFacts)
        assert facts.verification is not None
        numbers = [f"{facts.verification.max_relative_error:.1e}", f"{max(facts.layer_errors.values()):.1e}"]
        peak = max(reference.peak_bytes, verified.peak_bytes)
        seconds = [f"{each.outcome.seconds:.1f}" for each in (reference, verified)]
        table.add_row(device, *seconds, f"{peak / 1e9:.2f} GB", *numbers)
        key = reference.outcome.output("reference.safetensors").key
        logits[device] = load_file(store / key)["logits"]
        print(reference.outcome.log_tail, verified.outcome.log_tail, sep="\n", flush=True)
    Console(width=120).print(table)
    difference = np.abs(logits["cuda"] - logits["cpu"]).max() / np.abs(logits["cpu"]).max()
    print(f"largest difference of the reference's logits between the devices: {difference:.1e} of the largest logit")


def prove(spec: BuildSpec, device: str, outcomes: dict[str, Outcome], store: Path, threads: int) -> tuple[Measured, Measured]:
    """Run the reference and the verification on a device."""
    verification = spec.verification.model_copy(update={"device": device})
    plan = preparation.plan(spec.model_copy(update={"verification": verification}))
    found = []
    for step in (next(plan.of_kind(Kind.REFERENCE)), next(plan.of_kind(Kind.VERIFY))):
        found.append(run_apart(step, outcomes, store.resolve().as_uri(), threads))
        outcomes[step.digest] = found[-1].outcome
    return found[0], found[1]


if __name__ == "__main__":
    main()
