"""Builds of a small model on a real S3 server through a proxy that hurts requests at seeded random points.

    python -m benchmarks.storage_faults [--builds 50] [--rate 0.25] [--server seaweed|ceph]

A hurt request is answered with 503 SlowDown, reset in the middle of its body, done and not answered, answered by half, or by half
and then nothing. Steps have one attempt, requests four. A build must end right, or with an error that says what to do and right
after running it again; then `collect` must leave nothing (tests/support/storm.py asserts all of it). Odd seeds transfer
through obstore, even ones through s3fs. Prints a line per build; exits with 1 when one was not as it must be.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.storage import store
from tests.support.fault_proxy import run_fault_proxy
from tests.support.s3_server import S3Server
from tests.support.storm import VOCAB_SIZE, Weathered, weather
from tests.support.tiny import write_tiny_llama


def main() -> int:
    """Run the builds."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--server", choices=["seaweed", "ceph"], default="seaweed")
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder.resolve()) as folder,
        store(arguments.server, Path(folder)) as (server, url),
    ):
        return storms(server, url, Path(folder), arguments.builds, arguments.rate)


def storms(server: S3Server | None, url: str, folder: Path, builds: int, rate: float) -> int:
    """Print a line per build and the sum."""
    assert server is not None
    source = write_tiny_llama(folder / "model", vocab_size=VOCAB_SIZE)
    done: list[Weathered] = []
    failed = 0
    print(f"{server.name}, {builds} builds, {rate:.0%} of requests hurt\nseed  through  requests  hurt  runs  seconds  collected")
    with run_fault_proxy(server) as proxy:
        for seed in range(1, builds + 1):
            try:
                found = weather(proxy, f"{url}/{seed}", source, seed, rate)
            except AssertionError as error:
                failed += 1
                print(f"{seed:4}  FAILED: {error}", flush=True)
                continue
            done.append(found)
            numbers = f"{found.requests:8}  {found.hurt:4}  {len(found.errors) + 1:4}  {found.seconds:7.1f}  {found.left:9}"
            print(f"{seed:4}  {found.transfer:7}  {numbers}  {'; '.join(found.errors)[:160]}".rstrip(), flush=True)
    at_once = sum(not found.errors for found in done)
    hurt = f"{sum(found.requests for found in done)} requests, {sum(found.hurt for found in done)} hurt"
    again = f"{len(done) - at_once} after a clear error and another run"
    print(f"{hurt}: {at_once} builds right at once, {again}, {failed} wrong; nothing left after collect")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
