"""Conversion of a seeded 8 GB Llama at tp=4, pp=2, against `cp` of the same bytes and against the usual way, in one run.

    python -m benchmarks.convert_vs_usual [--folder DIR] [--rounds N]

The usual way: transformers loads the model, each rank's slices are made and saved with safetensors.torch, and each file is
read again for its sha256. All three start with the source out of the page cache and end with their files on disk (`sync`).
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

from benchmarks.convert import copy_seconds
from benchmarks.sources import write_llama
from orchestrator.checkpoints.safetensors import read_header
from orchestrator.clusters.local import LocalCluster
from orchestrator.events import silent
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.scheduling import execute
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store

GB = 10**9
TP, PP = 4, 2
Shapes = dict[str, dict[str, tuple[int, ...]]]
"""File name to tensor name to shape."""


@dataclass(frozen=True)
class Measured:
    """One conversion."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Of the largest process."""
    shapes: Shapes


def main() -> None:
    """Write the source, run all three, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--rounds", type=int, default=1, help="of cp and of ours; the usual way runs once")
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    source = arguments.folder / f"llama-{arguments.layers}-layers"
    total = write_llama(source, num_files=4, layers=arguments.layers, vocab=65536)
    plan = convert_plan(source)
    copies, runs = [], []
    for _ in range(arguments.rounds):
        forget(source)
        copies.append(copy_seconds(source, arguments.folder / "copy"))
        forget(source)
        measured, outcomes = convert(plan, arguments.folder / "store")
        runs.append(measured)
    forget(source)
    usual = convert_usually(source, arguments.folder / "usual")
    assert usual.shapes == runs[0].shapes, "the two ways made different tensors"
    read = sum(outcome.facts.source_bytes_read for outcome in outcomes)
    cpu = statistics.median(run.cpu_seconds for run in runs) / total * GB
    wall, copy = statistics.median(run.wall_seconds for run in runs), statistics.median(copies)
    ratio = statistics.median(run.wall_seconds / one for run, one in zip(runs, copies, strict=True))
    peak = max(run.peak_bytes for run in runs)
    written = sum(output.num_bytes for outcome in outcomes for output in outcome.outputs)
    print(f"source {total / GB:.2f} GB in 4 files, tp={TP}, pp={PP}, {len(plan.steps)} steps, {written / GB:.2f} GB written")
    print(f"CPU seconds per GB, with sha256   {cpu:8.2f}      (goal 0.9; the usual way {usual.cpu_seconds / total * GB:.2f})")
    print(f"wall time / cp and sync           {ratio:8.2f}      (goal 1.3; cp {copy:.1f} s, ours {wall:.1f} s)")
    print(f"peak memory per worker            {peak / 1e6:8.0f} MB   (the usual way {usual.peak_bytes / 1e6:.0f} MB)")
    print(f"source bytes read / source size   {read / total:8.4f}      (goal 1.00)")
    print(f"speed-up over the usual way       {usual.wall_seconds / wall:8.2f}      (goal 5; it took {usual.wall_seconds:.1f} s)")


def forget(source: Path) -> None:
    """Put the source's files out of the page cache, and nobody else's."""
    for path in source.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def convert_plan(source: Path) -> Plan:
    """The convert steps of the checkpoint."""
    spec = decode(
        BuildSpec,
        {
            "source": {"path": str(source.resolve())}, "topology": {"tp": TP, "pp": PP},
            "release": {"name": "bench", "version": "1"},
        },
        "benchmark",
    )  # fmt: skip
    made = preparation.plan(spec)
    return Plan(made.spec, made.inputs, tuple(made.of_kind(Kind.CONVERT)))


def convert(plan: Plan, folder: Path) -> tuple[Measured, list[Outcome]]:
    """All steps on this machine's processes, into an empty store."""
    shutil.rmtree(folder, ignore_errors=True)
    url = folder.resolve().as_uri()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    result = execute.execute(plan, {}, ClusterSpec(store=url), LocalCluster, silent)
    result.raise_failures(plan)
    subprocess.run(["sync", "-f", str(folder)], check=True)
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcomes = [result.outcomes[step.digest] for step in plan.steps]
    paths = {output.name: open_store(url).local_path(output.key) for outcome in outcomes for output in outcome.outputs}
    shapes = {name: _shapes(path) for name, path in paths.items() if path is not None}
    shutil.rmtree(folder)
    peak = max(int(outcome.facts.peak_memory_bytes) for outcome in outcomes)
    return Measured(wall, _cpu(after) - _cpu(before), peak, shapes), outcomes


def convert_usually(source: Path, folder: Path) -> Measured:
    """The usual way, in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.usual_way", str(source), str(folder), str(TP), str(PP)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the usual way ended with {process.returncode}")
    subprocess.run(["sync", "-f", str(folder)], check=True)
    wall = time.monotonic() - began
    shapes = {path.name: _shapes(path) for path in folder.glob("*.safetensors")}
    shutil.rmtree(folder)
    return Measured(wall, _cpu(usage), usage.ru_maxrss * 1024, shapes)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.shape for entry in read_header(path)[0]}


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
