"""Builds of a tiny model on three real Ray nodes, each with a fault at a random moment: `python -m benchmarks.faults [--builds N]`.

Every build must end published, with every rank executed and every byte right, with no committed step run again, and with a
converted checkpoint equal to that of a build that nothing happened to. Exit code 1 otherwise. The same seed gives the same
faults. Needs root on Linux: the nodes are namespaces of this machine.
"""

from __future__ import annotations

import argparse
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

from tests.models.bed_build import BedBuild, checkpoint, published, started_again
from tests.models.bed_faults import FAULTS, Scene
from tests.models.ray_nodes import RayNodes, ray_nodes, skip_reason
from tests.models.tiny import write_tiny_llama

_MOST_DRIVERS = 4
_ENDS_SECONDS = 300.0


@dataclass(frozen=True)
class Row:
    """How one build went."""

    number: int
    fault: str
    seconds: float
    drivers: int
    lost: int
    """Attempts that came to nothing."""
    moved: int
    """Of them, handed over without counting."""
    problems: tuple[str, ...]


def faults_of(seed: int, count: int) -> Iterator[tuple[str, int]]:
    """A fault and a seed for each build: all kinds in turn, in a new random order each round."""
    chance = random.Random(seed)
    rounds = (chance.sample(sorted(FAULTS), len(FAULTS)) for _ in itertools.count())
    for name in itertools.islice(itertools.chain.from_iterable(rounds), count):
        yield name, chance.randrange(2**32)


def build_once(bed: RayNodes, source: Path, number: int, name: str | None, seed: int) -> tuple[Row, dict[str, str]]:
    """One build with a fault (None: quiet); its row, and the digests of its checkpoint."""
    version = f"{number}"
    build = BedBuild(bed, source, version, f"file://{bed.folder}/stores/{version}", topology={"tp": 2, "pp": 1})
    scene = Scene(bed, build, seed)
    began = time.monotonic()
    if name == "scratch full":
        FAULTS[name](scene)
        scene.drive()
    else:
        scene.drive()
        if name is not None:
            FAULTS[name](scene)
    code = build.wait(_ENDS_SECONDS)
    while code != 0 and scene.drivers < _MOST_DRIVERS and not scene.build.of("finish"):
        scene.drive()  # as a user would: the same command again
        code = build.wait(_ENDS_SECONDS)
    seconds = time.monotonic() - began
    failed = build.of("failed")
    moved = sum(line["failure"]["kind"] == "handed_over" for line in failed)
    again = started_again(build)
    problems = [f"exit code {code}: {build.explain()}"] if code else []
    problems += [f"ran again: {', '.join(again)}"] if again else []
    problems += [problem for problem in [published(build)] if problem]
    told = scene.told if name is not None else "none"
    return Row(number, told, seconds, scene.drivers, len(failed) - moved, moved, tuple(problems)), checkpoint(build)


def run(count: int, seed: int, console: Console) -> int:
    """All builds; number of those that went wrong."""
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ray_nodes() as bed:
        source = write_tiny_llama(Path(folder) / "tiny", num_hidden_layers=2)
        quiet, expected = build_once(bed, source, 0, None, seed)
        rows.append(quiet)
        console.print(f"{quiet.number:3} {quiet.fault}: {quiet.seconds:.1f} s {' '.join(quiet.problems)}", highlight=False)
        for number, (name, own_seed) in enumerate(faults_of(seed, count), start=1):
            bed.restore()
            row, found = build_once(bed, source, number, name, own_seed)
            if found != expected:
                row = replace(row, problems=(*row.problems, "its checkpoint differs from the quiet build's"))
            rows.append(row)
            state = "ok" if not row.problems else "WRONG: " + "; ".join(row.problems)
            console.print(f"{row.number:3} {row.fault}: {row.seconds:.1f} s, {state}", highlight=False)
    wrong = sum(bool(row.problems) for row in rows)
    console.print(table(rows))
    verdict = "all published, verified and equal to the quiet build" if not wrong else f"{wrong} WRONG"
    console.print(
        f"{count} builds with faults, seed {seed}: {verdict}; no committed step ran twice in "
        f"{sum('ran again' not in ' '.join(row.problems) for row in rows)} of {len(rows)}; {time.monotonic() - began:.0f} s",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return wrong


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
    options = parser.parse_args()
    reason = skip_reason()
    if reason is not None:
        print(f"not run: {reason}", file=sys.stderr)
        return 1
    return 1 if run(options.builds, options.seed, Console(width=120)) else 0


if __name__ == "__main__":
    sys.exit(main())
