"""A loopback HTTP proxy before an S3 server that hurts requests: by script, or at seeded random points."""

from __future__ import annotations

import http.client
import random
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.support.s3_server import S3Server


class Fault(Enum):
    """What happens to one request."""

    BUSY = auto()
    """503 SlowDown; the server never sees the request."""
    CONFLICT = auto()
    """409 ConditionalRequestConflict, likewise."""
    EXPIRED = auto()
    """403 ExpiredToken, likewise."""
    NOT_IMPLEMENTED = auto()
    """501, likewise."""
    RESET = auto()
    """The connection is reset in the middle of the request's body."""
    LOST_ANSWER = auto()
    """The server does it, then the connection is reset."""
    TRUNCATED = auto()
    """The server does it, and half of the answer's body comes."""
    STALL = auto()
    """The server does it, half of the answer comes, and then nothing, until the client gives up."""
    DAMAGED_REQUEST = auto()
    """A bit of the request's body is flipped."""
    DAMAGED_ANSWER = auto()
    """A bit of the answer's body is flipped."""
    UNCONDITIONAL = auto()
    """A lost condition (412) is answered as a success, as by a server that ignores it."""


_ANSWERS = {
    Fault.BUSY: (503, "SlowDown"),
    Fault.CONFLICT: (409, "ConditionalRequestConflict"),
    Fault.EXPIRED: (403, "ExpiredToken"),
    Fault.NOT_IMPLEMENTED: (501, "NotImplemented"),
}


@dataclass
class FaultProxy:
    """What the proxy does, and what it has seen. Requests that no rule names pass."""

    url: str
    upstream: S3Server
    script: list[tuple[str, Fault]] = field(default_factory=list)
    """Method and fault: the first entry of a request's method is used up by it."""
    always: dict[str, Fault] = field(default_factory=dict)
    """By method."""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Method and path with query of every request."""
    hurt: int = 0
    """Requests of a storm that were hurt."""
    rate: float = 0.0
    kinds: tuple[Fault, ...] = ()
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def storm(self, seed: int, rate: float, kinds: tuple[Fault, ...]) -> None:
        """From now on hurt that share of the requests."""
        self.generator, self.rate, self.kinds = random.Random(seed), rate, kinds

    def count(self, method: str, word: str = "") -> int:
        """Requests of a method with `word` in path or query."""
        return sum(seen == method and word in path for seen, path in self.seen)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """What to do to this request."""
        with self._lock:
            self.seen.append((method, path))
            for entry in self.script:
                if entry[0] == method:
                    self.script.remove(entry)
                    return entry[1]
            if method in self.always:
                return self.always[method]
            if self.generator.random() >= self.rate:
                return None
            self.hurt += 1
            return self.generator.choice(self.kinds)


@contextmanager
def run_fault_proxy(server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the server, on a free port of loopback; plain http, whatever the server speaks."""

    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        Handler.proxy = FaultProxy(f"http://127.0.0.1:{proxy.server_address[1]}", server)
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield Handler.proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._do
        raise AttributeError(name)

    def log_message(self, *words: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client gave up
            self.close_connection = True

    def _do(self) -> None:
        fault = self.proxy.next_fault(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault is Fault.RESET:
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if fault in _ANSWERS:
            self._refuse(*_ANSWERS[fault])
            return
        status, headers, answer = self._forward(_flipped(body) if fault is Fault.DAMAGED_REQUEST else body)
        if fault is Fault.LOST_ANSWER:
            self._reset()
            return
        if fault is Fault.UNCONDITIONAL and status == 412:
            status, headers, answer = 200, [("Content-Length", "0"), ("ETag", '"0"')], b""
        if fault is Fault.DAMAGED_ANSWER:
            answer = _flipped(answer)
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if fault in {Fault.TRUNCATED, Fault.STALL}:
            self.wfile.write(answer[: len(answer) // 2])
            if fault is Fault.STALL and answer:
                self.connection.recv(1)  # returns when the client closes
            self.close_connection = True
        else:
            self.wfile.write(answer)

    def _refuse(self, status: int, code: str) -> None:
        answer = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        left_out = {"expect", "connection"}
        server = self._connection()
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in left_out:
                    server.putheader(name, value)
            server.endheaders(body)
            response = server.getresponse()
            answer = response.read()
            headers = [item for item in response.getheaders() if item[0].lower() not in {"transfer-encoding", "connection"}]
            if "content-length" not in {name.lower() for name, _ in headers}:
                headers.append(("Content-Length", str(len(answer))))
            return response.status, headers, answer
        finally:
            server.close()

    def _connection(self) -> http.client.HTTPConnection:
        upstream = self.proxy.upstream
        place = urlsplit(upstream.endpoint).netloc
        if upstream.ca_bundle is None:
            return http.client.HTTPConnection(place, timeout=60)
        return http.client.HTTPSConnection(place, timeout=60, context=ssl.create_default_context(cafile=str(upstream.ca_bundle)))

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _flipped(data: bytes) -> bytes:
    """The data with a bit of its middle byte changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
