"""Reference and verification as they are now and as an earlier revision had them: seconds and memory, by turns, in one run.

    git worktree add --detach DIR f1802ca^
    python -m benchmarks.proof_before --tree DIR [--packages DIR] [--model DIR | --layers 4] [--tp 3] [--pp 2] [--cuda]

f1802ca brought the ranks in lockstep; before it, transformers held the whole model, and every rank ran its whole graph under
mpiexec. `--packages`: a folder with what only the earlier revision needs (`pip install --no-deps --target DIR
onnxruntime_extensions`). Without --model it is the seeded model of the 8B's width of benchmarks.proof. The time of importing and of
planning is not counted; memory is the sum of the proportional set sizes of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.proof import WIDTHS, write_source

_CHILD = """
import json, sys, time
try:
    from orchestrator.planning.preparation import plan
    from orchestrator.planning.steps import Kind
    from orchestrator.spec.build import BuildSpec
    from orchestrator.spec.decoding import decode
except ImportError:
    from orchestrator.core.spec import BuildSpec, decode
    from orchestrator.core.step import Kind
    from orchestrator.verbs import plan
import torch, transformers, onnxruntime
from tests.integration.steps import run_steps
made, store = plan(decode(BuildSpec, json.loads(sys.argv[1]), "benchmark")), sys.argv[2]
run_steps(made, store, (Kind.CONVERT,))
print("begin", flush=True)
begun = time.monotonic()
run_steps(made, store, (Kind.CONVERT, Kind.REFERENCE))
print("reference", time.monotonic() - begun, flush=True)
begun = time.monotonic()
outcomes = run_steps(made, store, (Kind.CONVERT, Kind.REFERENCE, Kind.VERIFY))
print("verification", time.monotonic() - begun, flush=True)
facts = list(outcomes.values())[-1].facts
found = facts["verification"] if isinstance(facts, dict) else facts.verification.model_dump()
print("error", found["max_relative_error"], flush=True)
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="Checkout of the earlier revision.")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="Measure the proof on a GPU too.")
    parser.add_argument("--folder", type=Path, default=Path(".cache/before"))
    arguments = parser.parse_args()
    source: Path = arguments.model or arguments.folder / f"8b-layers{arguments.layers}"
    if not (source / "config.json").is_file():
        write_source(source, WIDTHS["8b"], arguments.layers)
    spec = {
        "source": {"path": str(source.resolve())}, "topology": {"tp": arguments.tp, "pp": arguments.pp},
        "release": {"name": "none", "version": "0"}, "engine": {"max_batch_size": 2, "max_input_len": 64, "max_seq_len": 128},
    }  # fmt: skip
    on_gpu = {**spec, "verification": {"device": "cuda"}}
    trees: dict[str, tuple[Path, dict[str, Any]]] = {"before": (arguments.tree, spec), "now": (Path.cwd(), spec)}
    trees |= {"now, cuda": (Path.cwd(), on_gpu)} if arguments.cuda else {}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(arguments.rounds):
        for name, (tree, wanted) in trees.items():
            rounds[name].append(prove(tree, arguments.packages, wanted, arguments.folder / "store", arguments.threads))
            print(name, rounds[name][-1], flush=True)
    Console(width=120).print(table(rounds))


def table(rounds: dict[str, list[dict[str, float]]]) -> Table:
    """Medians of the rounds, and the ratio of the seconds to those before."""
    made = Table("revision", "reference s", "verification s", "both s", "before / this", "peak", "relative error", box=None)
    both = {name: statistics.median(one["reference"] + one["verification"] for one in found) for name, found in rounds.items()}
    for name, found in rounds.items():
        seconds = [f"{statistics.median(one[part] for one in found):.1f}" for part in ("reference", "verification")]
        peak = max(one["peak"] for one in found)
        ratio = f"{both['before'] / both[name]:.2f}"
        made.add_row(name, *seconds, f"{both[name]:.1f}", ratio, f"{peak / 1e9:.2f} GB", f"{found[0]['error']:.1e}")
    return made


def prove(tree: Path, packages: Path | None, spec: dict[str, Any], store: Path, threads: int) -> dict[str, float]:
    """One round in a process of its own: seconds of both steps, the error, and the peak of memory of both in bytes."""
    shutil.rmtree(store, ignore_errors=True)
    path = os.pathsep.join(str(each.resolve()) for each in (tree, packages) if each)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-c", _CHILD, json.dumps(spec), store.resolve().as_uri()]
    printed, peak = store.with_suffix(".txt"), 0.0
    with printed.open("w") as output, subprocess.Popen(words, stdout=output, env=environment, cwd=tree) as child:
        while child.poll() is None:
            if printed.stat().st_size:  # the conversion before is not counted
                peak = max(peak, memory(child.pid))
            time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"the proof in {tree} failed")
    lines = (line.split() for line in printed.read_text().splitlines())
    return {"peak": peak, **{words[0]: float(words[1]) for words in lines if len(words) == 2}}


def memory(pid: int) -> float:
    """The proportional set sizes of a process and its descendants, in bytes."""
    total = 0.0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.Error:
        return total
    return total


if __name__ == "__main__":
    main()
