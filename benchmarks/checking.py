"""Cost of checking inputs and to read back what is published: builds with and without, in one run.

    python -m benchmarks.checking [--folder DIR] [--layers N] [--shards] [--demo SOURCE] [--rounds N]

A build here is the whole of it (convert, build, verify of --demo, publish), with its steps in this process one after the other, so
that the same build can be run without the checks. The seeded Llama of benchmarks.convert_vs_usual is not verified: random weights
say nothing. Shards are out of the page cache when a step begins, as on nodes that have not seen them. With --shards its shards are
converted and checked, and no engine is built: minutes instead of an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.sources import write_llama
from orchestrator import building
from orchestrator.clusters.local import LocalCluster
from orchestrator.events import StepEvent, silent
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind, Outcome, Task
from orchestrator.releases import placing
from orchestrator.scheduling import checking, execute
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from orchestrator.work.streaming import stream

GB = 10**9


class InTurn:
    """The Cluster protocol in this process: a step runs when it is started, its inputs out of the page cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events: list[StepEvent] = []

    def start(self, task: Task) -> None:
        forget(self._folder)
        self._events.extend(stream(task, "here"))

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        found, self._events = self._events, []
        return found

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        self._events.clear()


@dataclass
class Measured:
    """One build."""

    wall_seconds: float
    cpu_seconds: float
    convert_seconds: float
    published_bytes: int
    read_bytes: int
    """Bytes of all steps' inputs."""
    read_back_seconds: float
    """From the end of the last step to the manifest."""


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """No input is hashed, nothing that is published is read back."""
    with mock.patch.object(checking.InputChecks, "begin", _nothing), mock.patch.object(placing, "_read_back", _trusted):
        yield


def _trusted(*given: Any, **_: Any) -> tuple[str, ...]:
    chunks: tuple[str, ...] = given[2].chunks
    return chunks


def _nothing(*_: Any) -> None:
    return None


def main() -> None:
    """Build with and without in turn, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--layers", type=int, default=16, help="of the seeded Llama; 0: leave it out")
    parser.add_argument(
        "--shards", action="store_true", help="convert the seeded Llama, check and read back its shards, build nothing"
    )
    parser.add_argument("--demo", type=Path, help="folder of a real model, built and verified at tp=3, pp=2")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.demo is not None:
        sections = {"topology": {"tp": 3, "pp": 2}, "verification": {"enabled": True}}
        compare("demo", arguments.demo, sections, arguments.folder / "checking", arguments.rounds)
    if arguments.layers:
        source = arguments.folder / f"llama-{arguments.layers}-layers"
        write_llama(source, num_files=4, layers=arguments.layers, vocab=65536)
        sections = {"topology": {"tp": 4, "pp": 2}, "verification": {"enabled": False}}
        if arguments.shards:
            check_shards(source, sections, arguments.folder / "checking")
            return
        compare("seeded Llama", source, sections, arguments.folder / "checking", arguments.rounds)


def compare(name: str, source: Path, sections: dict[str, Any], folder: Path, rounds: int) -> None:
    """Builds of `source` in turn: without, with."""
    spec = decode(
        BuildSpec, {"source": {"path": str(source.resolve())}, "release": {"name": "b", "version": "1"}, **sections}, name
    )
    without, checked = [], []
    for _ in range(rounds):
        with unchecked():
            without.append(build(spec, folder))
        checked.append(build(spec, folder))
    before, after = (statistics.median(run.wall_seconds for run in runs) for runs in (without, checked))
    cpu, more = (statistics.median(run.cpu_seconds for run in runs) for runs in (without, checked))
    last = checked[-1]
    print(f"{name}: {last.read_bytes / GB:.2f} GB of inputs hashed, {last.published_bytes / GB:.2f} GB read back, {rounds} rounds")
    print(f"  wall seconds without, with         {before:8.1f} {after:8.1f}   ratio {after / before:.3f}   (goal 1.05)")
    print(f"  CPU seconds without, with          {cpu:8.1f} {more:8.1f}   ratio {more / cpu:.3f}")
    print(f"  converting (not checked)           {last.convert_seconds:8.1f} s of it")
    print(f"  publishing without, with           {without[-1].read_back_seconds:8.2f} {last.read_back_seconds:8.2f} s", flush=True)


def check_shards(source: Path, sections: dict[str, Any], folder: Path) -> None:
    """Convert on this machine's processes; hash every shard as one node's steps would; read it back as publishing would."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = decode(BuildSpec, {"source": {"path": str(source.resolve())}, "release": {"name": "b", "version": "1"}, **sections}, "b")
    made = preparation.plan(spec)
    only = replace(made, steps=tuple(made.of_kind(Kind.CONVERT)))
    store = open_store(folder.resolve().as_uri())
    with timed("convert") as total:
        result = execute.execute(only, {}, ClusterSpec(store=store.url), LocalCluster, silent)
        result.raise_failures(only)
        subprocess.run(["sync", "-f", str(folder)], check=True)
    outputs = [output for outcome in result.outcomes.values() for output in outcome.outputs]
    forget(folder)
    with timed("check as inputs, once per node", total):
        checks = checking.InputChecks(folder, "benchmark")
        for output in outputs:
            path = store.local_path(output.key)
            assert path is not None
            checks.begin(output, path)
        checks.settle()
    with timed("check again, remembered", total):
        for output in outputs:
            again = checking.InputChecks(folder, "benchmark")
            again.begin(output, folder / output.key)
            again.settle()
            again.close()
    checks.close()
    forget(folder)
    with timed("read back", total):
        assert placing.damaged(store, outputs) is None
    print(f"{sum(output.num_bytes for output in outputs) / GB:.2f} GB in {len(outputs)} shards")
    shutil.rmtree(folder)


@contextlib.contextmanager
def timed(what: str, total: Total | None = None) -> Iterator[Total]:
    """Print what the block takes, and its share of `total`."""
    found, before, began = Total(), _cpu(), time.monotonic()
    yield found
    found.wall_seconds, found.cpu_seconds = time.monotonic() - began, _cpu() - before
    share = (
        f"   {found.wall_seconds / total.wall_seconds:.3f} and {found.cpu_seconds / total.cpu_seconds:.3f} of it" if total else ""
    )
    print(f"{what:32} {found.wall_seconds:7.2f} s, {found.cpu_seconds:7.2f} CPU s{share}", flush=True)


@dataclass
class Total:
    """Time that a block took."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


def build(spec: BuildSpec, folder: Path) -> Measured:
    """One whole build into an empty store."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, began = _cpu(), time.monotonic()
    ended: list[float] = []
    with mock.patch.object(execute, "drive", _timed(execute.drive, ended)):
        done = building.build(spec, ClusterSpec(store=folder.resolve().as_uri()), open_cluster=lambda place: InTurn(folder))
    wall = time.monotonic() - began
    assert done.result is not None
    outcomes: list[Outcome] = list(done.result.outcomes.values())
    sizes = {(outcome.digest, output.name): output.num_bytes for outcome in outcomes for output in outcome.outputs}
    measured = Measured(
        wall_seconds=wall,
        cpu_seconds=_cpu() - before,
        convert_seconds=sum(outcome.seconds for outcome in outcomes if outcome.kind.value == "convert"),
        published_bytes=done.manifest.num_bytes,
        read_bytes=sum(sizes[item.step, item.name] for outcome in outcomes for item in outcome.consumed),
        read_back_seconds=began + wall - ended[-1],
    )
    shutil.rmtree(folder)
    return measured


def _timed(drive: Any, ended: list[float]) -> Any:
    def timed(*arguments: Any) -> Any:
        result = drive(*arguments)
        ended.append(time.monotonic())
        return result

    return timed


def forget(folder: Path) -> None:
    """Put the store's files out of the page cache, and nobody else's."""
    subprocess.run(["sync", "-f", str(folder)], check=True)
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
