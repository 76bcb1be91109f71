"""Two processes build and publish different engines under one name and version at once, round after round.

    python -m benchmarks.storage_race [--rounds 20] [--server seaweed|ceph|file] [--same]

Every round builds engines of its own in both processes, into one cache. Exactly one must publish; the other must end with
ReleaseExistsError's exit code (with --same, both find the one manifest). Afterwards everything in the store is verified.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.storage import store
from tests.support.race import Racers, check_store, race
from tests.support.releases import make_keys
from tests.support.tiny import write_tiny_llama


def main() -> int:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--server", choices=["seaweed", "ceph", "file"], default="seaweed")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder.resolve()) as name, store(arguments.server, Path(name)) as (server, url):
        folder = Path(name)
        private, public = make_keys(folder / "keys")
        source = write_tiny_llama(folder / "model")
        began = time.monotonic()
        try:
            codes = Counter(race(Racers(source, url, private, arguments.same, rebuilds=True), arguments.rounds))
            sound = check_store(url, public, arguments.rounds)
        except AssertionError as error:
            print(f"FAILED: {error}")
            return 1
        ended = ", ".join(f"{count} times {first} and {second}" for (first, second), count in sorted(codes.items()))
        print(f"{server.name if server else 'a folder'}: {arguments.rounds} rounds in {time.monotonic() - began:.0f} s")
        print(f"exit codes: {ended}; {sound}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
