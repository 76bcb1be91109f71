"""A real S3 server of our own on loopback, whichever program it is: where it is, how clients find it, when it is ready."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "models"
KEY, SECRET = "test", "testsecret"
_READY_SECONDS = 120


@dataclass(frozen=True)
class S3Server:
    """A running server with an empty bucket."""

    name: str
    endpoint: str
    bucket: str
    ca_bundle: Path | None = None
    """PEM of who signed the server's certificate; None: plain http."""

    def environment(self) -> dict[str, str]:
        """What names the server and the credentials to every client."""
        found = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
        return found if self.ca_bundle is None else {**found, "AWS_CA_BUNDLE": str(self.ca_bundle)}


@contextmanager
def in_environment(server: S3Server) -> Iterator[None]:
    """As long as the block runs, clients of this process and its children find the server."""
    before = {name: os.environ.get(name) for name in server.environment()}
    os.environ.update(server.environment())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_ports(count: int) -> list[int]:
    """Ports whose companions 10000 above (SeaweedFS's gRPC) are free as well."""
    found: list[int] = []
    while len(found) < count:
        with contextlib.ExitStack() as stack:
            one, two, three = (stack.enter_context(socket.socket()) for _ in range(3))
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1] % 20000 + 20000
            try:
                two.bind(("127.0.0.1", port + 10000))
                three.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


def wait_ready(server: S3Server, processes: list[subprocess.Popen[bytes]], log: Callable[[], str]) -> None:
    """A real PUT is the only proof that a server is up: buckets are listed seconds earlier. Raises AssertionError."""
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        try:
            _signed_put(server, "", b"")
            _signed_put(server, "/ready", b"1")
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"{server.name} did not get ready: {log()[-2000:]}")


def _signed_put(server: S3Server, path: str, body: bytes) -> None:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    url = f"{server.endpoint}/{server.bucket}{path}"
    signed = AWSRequest("PUT", url, data=body)
    S3SigV4Auth(Credentials(KEY, SECRET), "s3", "us-east-1").add_auth(signed)
    request = urllib.request.Request(url, body, dict(signed.headers), method="PUT")
    context = ssl.create_default_context(cafile=str(server.ca_bundle)) if server.ca_bundle else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        opener.open(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 409:  # the bucket is there already
                raise
