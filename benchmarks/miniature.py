"""The miniature of every family and of every config.json in tests/data, then of a real build: errors, lengths, seconds.

    python -m benchmarks.miniature [--only WORD] [--build] [--model DIR]

`CPU` is that of the step without its imports, seconds of one thread; `layouts` are one rank, tp=2, tp=2 with ep=2
where there are experts, and two stages. Of larger models (vision, speech) it is that of the language model, or the reason why
they are refused. `--build` builds `--model` (tp=2, pp=2) and prints what the miniature's step took of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator import building
from orchestrator.base.errors import ArchitectureError, OrchestratorError
from orchestrator.families import family_for
from orchestrator.families.wrappers import is_wrapper, language_config
from orchestrator.planning.facts import Miniature
from orchestrator.planning.options import MiniatureOptions
from orchestrator.planning.steps import Kind
from orchestrator.report import format_seconds
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from tests.support.families import TINY, tiny_config_json
from tests.support.wrong_rules import CONFIGS

_IMPORTS = "import onnxruntime, torch, transformers; from orchestrator.work.miniature import proof"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="Configs whose name holds this word.")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--model", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console(width=190)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    console.print(f"imports, in a process of their own: {time.perf_counter() - began:.1f} s, {used:.1f} s of CPU")
    measured("warm up", tiny_config_json("llama"))
    table = Table("model", "family", "layers", "worst error", "layouts", "longer than (in the miniature)", "CPU", box=None)
    wrong, times = 0, []
    for name, config in configs():
        if arguments.only in name:
            row, seconds, right = measured(name, config)
            table.add_row(*row)
            wrong += not right
            times.append(seconds)
    console.print(table)
    spread = f"median {statistics.median(times):.2f}, longest {max(times):.2f}, sum {sum(times):.0f}"
    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    console.print(f"{len(times)} configs, {wrong} wrong; CPU seconds: {spread}; {load}")
    if arguments.build:
        console.print(of_a_build(arguments.model.resolve()))


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """By name: the tiny models of all families, then those of the hub."""
    yield from ((f"tiny {family}", tiny_config_json(family)) for family in TINY)
    for path in (*sorted(CONFIGS.glob("*.json")), *sorted((CONFIGS.parent / "larger_models").glob("*.json"))):
        yield path.stem, json.loads(path.read_text())


def measured(name: str, config: dict[str, Any]) -> tuple[list[str], float, bool]:
    """A row of the table, CPU seconds, and whether both sides agreed."""
    from orchestrator.work.miniature.proof import prove

    if is_wrapper(config):
        try:
            config = language_config(config)
        except ArchitectureError as error:
            return [name, "", "", "refused", "", error.message.partition("(")[2], ""], 0.0, True
    architecture = config["architectures"][0]
    family = family_for(architecture).name
    options = MiniatureOptions(config=config, family=family, architecture=architecture)
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="miniature-") as folder:
        try:
            found = prove(options, Path(folder), lambda done, total: None)
        except OrchestratorError as error:
            seconds = time.process_time() - began
            return [name, family, "", "wrong", "", error.message, f"{seconds:.2f}"], seconds, False
    seconds = time.process_time() - began
    error = f"{found.max_relative_error:.1e}"
    return [name, family, f"{found.num_layers}", error, f"{len(found.cases)}", lengths(found), f"{seconds:.2f}"], seconds, True


def lengths(found: Miniature) -> str:
    """E.g. window 4096 (8), trained 8192 (32), and in brackets what no text was longer than."""
    short = {"sliding_window": "window", "max_position_embeddings": "positions", "original_max_position_embeddings": "trained"}
    texts = [f"{short.get(each.key, each.key)} {each.value} ({each.tokens})" for each in found.thresholds if each.crossed]
    beyond = [f"{short.get(each.key, each.key)} {each.value}" for each in found.thresholds if not each.crossed]
    return ", ".join(texts) + (f"; not {', '.join(beyond)}" if beyond else "")


def of_a_build(model: Path) -> str:
    """Build a model twice, the second time as another release with other limits, and compare the seconds of its steps."""
    with tempfile.TemporaryDirectory(prefix="miniature-") as folder:
        place = ClusterSpec(store=Path(folder, "store").resolve().as_uri())
        lines = []
        for version, batch in (("1", 2), ("2", 1)):
            plain = {
                "source": {"path": str(model)}, "topology": {"tp": 3, "pp": 2}, "release": {"name": "bench", "version": version},
                "engine": {"max_batch_size": batch, "max_input_len": 128, "max_seq_len": 256},
            }  # fmt: skip
            began = time.perf_counter()
            done = building.build(decode(BuildSpec, plain, "benchmark"), place)
            took = time.perf_counter() - began
            assert done.result is not None
            (step,) = done.plan.of_kind(Kind.MINIATURE)
            work = sum(outcome.seconds for digest, outcome in done.result.outcomes.items() if digest in done.result.ran)
            mine = done.result.outcomes[step.digest].seconds if step.digest in done.result.ran else 0.0
            lines.append(
                f"build {version} of {model.name}: {format_seconds(took)} on {os.cpu_count()} cores, {format_seconds(work)} of "
                f"steps; of them the miniature, imports included: {mine:.1f} s, {100 * mine / work:.1f} %"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
