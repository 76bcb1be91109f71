"""The whole demo in a real store: a release of SmolLM2 built on Ray, killed, resumed, pulled, verified, tagged, damaged, collected.

    python -m benchmarks.storage [--server seaweed|ceph|file] [--model FOLDER]

seaweed: SeaweedFS over http; ceph: Ceph RGW over https with a CA of its own (Debian's radosgw, ceph-mon and ceph-osd must be
installed); file: a folder. Servers listen on loopback and end with the program. Prints a line per step and exits with 1 when one
does not show what it must (tests/support/demo.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.ceph import PACKAGES, missing_programs, run_ceph
from tests.support.demo import Demo
from tests.support.s3_server import SECRET, S3Server, in_environment
from tests.support.seaweed import run_seaweed

SPEC = {
    "topology": {"tp": 3, "pp": 2},
    "engine": {"max_batch_size": 4, "max_input_len": 256, "max_seq_len": 1024},
    "release": {"name": "smollm2"},
}
CLUSTER = {"kind": "ray", "pools": {"default": {}}, "retries": {"max_attempts": 4, "backoff_seconds": 2}, "threads_per_step": 1}
_RAY_LOGS = Path("/tmp/ray")  # where Ray keeps its sessions


def main() -> int:
    """Run the walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=["seaweed", "ceph", "file"], default="seaweed")
    parser.add_argument("--model", type=Path, default=Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench"))
    arguments = parser.parse_args()
    if arguments.server == "ceph" and missing_programs():
        print(f"not installed: {', '.join(missing_programs())}. As root: apt-get install --no-install-recommends {PACKAGES}")
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    spec = {"source": {"path": str(arguments.model.resolve())}, **SPEC}
    logs = functools.partial(ray_logs, time.time())
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder.resolve()) as folder,
        store(arguments.server, Path(folder)) as (name, url),
    ):
        return walk(name, Demo(Path(folder, "demo"), url, spec, CLUSTER, secrets=(SECRET,), logs=logs))


@contextlib.contextmanager
def store(server: str, folder: Path) -> Iterator[tuple[S3Server | None, str]]:
    """A server, None for a folder, and the URL of a store; there as long as the block runs."""
    if server == "file":
        yield None, (folder / "store").as_uri()
        return
    data = folder / "server"
    data.mkdir()
    with (run_ceph if server == "ceph" else run_seaweed)(data) as running, in_environment(running):
        yield running, f"s3://{running.bucket}/demo"


def ray_logs(since: float) -> Iterator[Path]:
    """Logs of Ray sessions that were written after a moment."""
    for directory, _, names in os.walk(_RAY_LOGS):
        for path in (Path(directory, name) for name in names):
            with contextlib.suppress(OSError):
                if "logs" in path.parts and path.is_file() and path.stat().st_mtime >= since:
                    yield path


def walk(name: str, demo: Demo) -> int:
    """Print every step; 0 when all have shown what they must."""
    print(f"store: {name}", flush=True)
    began = time.monotonic()
    count = 0
    try:
        for step, seconds, result in demo.walk():
            print(f"{seconds:7.1f} s  {step:45} {result}", flush=True)
            count += 1
    except AssertionError as error:
        print(f"FAILED after {count} steps: {error}")
        return 1
    print(f"{count} of {count} steps right in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
