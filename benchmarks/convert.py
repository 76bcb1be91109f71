"""Conversion at tp=2 of a seeded 4 GB Llama-shaped checkpoint, against `cp` of the same bytes in the same run.

    python -m benchmarks.convert [--folder DIR] [--rounds N]

Prints peak memory, CPU seconds per GB (sha256 of every output included), source bytes read / source size, and the ratio of
wall times. Both sides end on disk: our writer syncs every shard, `cp` is followed by `sync` of its files.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sources import write_llama
from orchestrator.events import STEP_EVENT, StepFailed, StepSucceeded
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind, Outcome, Step, Task
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode

GB = 10**9


@dataclass(frozen=True)
class Measured:
    """One conversion."""

    wall_seconds: float
    cpu_seconds: float
    outcome: Outcome


def main() -> None:
    """Write the source, run the rounds, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source = arguments.folder / "llama-4gb"
    total = write_llama(source, num_files=2, layers=8, vocab=32768)
    step = plan_step(source)
    largest = max(read["tensor"]["num_bytes"] for target in step.options["targets"] for read in target["reads"])
    runs, copies = [], []
    for _ in range(arguments.rounds):
        copies.append(copy_seconds(source, arguments.folder / "copy"))
        runs.append(convert(step, arguments.folder / "store"))
    peak = max(run.outcome.facts.peak_memory_bytes for run in runs)
    read = runs[0].outcome.facts.source_bytes_read
    written = sum(output.num_bytes for output in runs[0].outcome.outputs)
    cpu = statistics.median(run.cpu_seconds for run in runs)
    ratio = statistics.median(run.wall_seconds / copy for run, copy in zip(runs, copies, strict=True))
    limit = 2 * largest + 300_000_000
    print(f"source {total / GB:.2f} GB in 2 files, tp=2, {written / GB:.2f} GB written, {arguments.rounds} rounds")
    print(f"peak memory of the convert task   {peak / 1e6:8.0f} MB   (limit 2 x largest tensor + 300 MB = {limit / 1e6:.0f} MB)")
    print(f"CPU seconds per GB, with sha256   {cpu / (total / GB):8.2f}      (goal 1.0 or less)")
    print(f"source bytes read / source size   {read / total:8.4f}      (goal 1.00)")
    print(f"wall time / cp and sync           {ratio:8.2f}      (median; cp took {statistics.median(copies):.1f} s)")
    if peak > limit or read != total:
        raise SystemExit("a limit was missed")


def plan_step(source: Path) -> Step:
    """The one convert step of the checkpoint at tp=2."""
    spec = decode(
        BuildSpec,
        {
            "source": {"path": str(source.resolve())}, "topology": {"tp": 2},
            "release": {"name": "bench", "version": "1"},
        },
        "benchmark",
    )  # fmt: skip
    (step,) = preparation.plan(spec).of_kind(Kind.CONVERT)
    return step


def convert(step: Step, store: Path) -> Measured:
    """Run the step in a worker process of its own, into an empty store."""
    shutil.rmtree(store, ignore_errors=True)
    task = Task(step=step, inputs={}, attempt=1, store=store.resolve().as_uri())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.work", "here"],
        input=task.model_dump_json().encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    event = STEP_EVENT.validate_json(done.stdout.splitlines()[-1])
    if isinstance(event, StepFailed):
        raise SystemExit(event.failure.message)
    assert isinstance(event, StepSucceeded)
    shutil.rmtree(store)
    return Measured(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, event.outcome)


def copy_seconds(source: Path, target: Path) -> float:
    """Wall seconds of `cp` and `sync` of the source's weights."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    files = [str(path) for path in sorted(source.glob("*.safetensors"))]
    began = time.monotonic()
    subprocess.run(["cp", "--reflink=never", *files, str(target)], check=True)
    subprocess.run(["sync", *[str(path) for path in target.iterdir()]], check=True)
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    main()
