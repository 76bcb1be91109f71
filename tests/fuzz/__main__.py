"""`python -m tests.fuzz KIND --count N --seed S`: run cases, print those that fail and a summary, end with 1 when any did."""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.fuzz import FUZZERS
from tests.fuzz.harness import Ended, Fuzzer, open_fuzzer, remove, run_case

_SHOWN_BYTES = 3000


def main() -> int:
    """Exit code: 0 when every case passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=sorted(FUZZERS))
    parser.add_argument("--count", type=int, default=200, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone, and print what its commands print")
    parser.add_argument("--keep", type=Path, help="with --case: keep its files in this folder")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        fuzzer = open_fuzzer(asked.kind)
        base = Path(scratch) / "base"
        base.mkdir()
        fuzzer.prepare(base)
        if asked.case is not None:
            return _replay(fuzzer, asked.kind, asked.seed, asked.case, asked.keep or Path(scratch) / "case")
        return _run(fuzzer, asked, Path(scratch) / "case")


def _run(fuzzer: Fuzzer, asked: argparse.Namespace, folder: Path) -> int:
    started, failed, done = time.monotonic(), 0, 0
    codes: collections.Counter[int] = collections.Counter()
    slowest, largest, longest = (0.0, 0), (0, 0), (0, 0)
    for number in range(asked.count):
        if time.monotonic() - started > asked.seconds:
            break
        done += 1
        for ended, seconds in _timed(fuzzer, asked.kind, asked.seed, number, folder):
            codes[ended.code] += 1
            slowest = max(slowest, (seconds, number))
            largest = max(largest, (ended.memory_bytes, number))
            longest = max(longest, (len(ended.stderr), number))
            if ended.problem:
                failed += 1
                _show(ended, f"python -m tests.fuzz {asked.kind} --seed {asked.seed} --case {number}")
    remove(folder)
    print(
        f"{asked.kind}: {done} cases of seed {asked.seed}, {sum(codes.values())} commands, {failed} failed, "
        f"{time.monotonic() - started:.1f} s"
    )
    print("exit codes: " + ", ".join(f"{code} x {count}" for code, count in sorted(codes.items())))
    print(
        f"slowest command {slowest[0]:.2f} s (case {slowest[1]}), most memory {largest[0] / 1e6:.0f} MB (case {largest[1]}), "
        f"longest message {longest[0]:,} bytes (case {longest[1]})"
    )
    return 1 if failed or not done else 0


def _timed(fuzzer: Fuzzer, kind: str, seed: int, number: int, folder: Path) -> list[tuple[Ended, float]]:
    found, moment = [], time.monotonic()
    for ended in run_case(fuzzer, kind, seed, number, folder):
        found.append((ended, time.monotonic() - moment))
        moment = time.monotonic()
    return found


def _show(ended: Ended, again: str) -> None:
    print(f"FAILED {' '.join(ended.words)}: {ended.problem}\n  again: {again}")
    shown = (ended.stderr or ended.stdout)[-_SHOWN_BYTES:].decode(errors="replace")
    print("".join(f"  | {line}\n" for line in shown.splitlines()), end="", flush=True)


def _replay(fuzzer: Fuzzer, kind: str, seed: int, number: int, folder: Path) -> int:
    failed = 0
    for ended in run_case(fuzzer, kind, seed, number, folder.resolve()):
        print(f"$ orchestrator {' '.join(ended.words)}    # exit code {ended.code}", flush=True)
        sys.stdout.buffer.write(ended.stdout + ended.stderr)
        sys.stdout.buffer.flush()
        if ended.problem:
            failed += 1
            print(f"FAILED: {ended.problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
