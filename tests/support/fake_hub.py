"""The Hugging Face hub on a port of this machine, as far as huggingface_hub asks it: one model per folder, at named commits."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """What it serves and what it was asked."""

    folders: dict[str, Path] = field(default_factory=dict)
    """Commit -> files."""
    branches: dict[str, str] = field(default_factory=lambda: {"main": ""})
    """Branch -> commit."""
    repo: str = "acme/tiny"
    refusal: tuple[int, str] | None = None
    """Status and X-Error-Code of every answer."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range."""
    fetched: int = 0
    """Bytes of files that were sent."""
    url: str = ""


def _large(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _entry(root: Path, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    made: dict[str, Any] = {"type": "file", "oid": blob, "size": len(data), "path": path.relative_to(root).as_posix()}
    if _large(path):
        made["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return made


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if hub.refusal:
            self._json({"error": "refused"}, hub.refusal[0], **({"X_Error_Code": hub.refusal[1]} if hub.refusal[1] else {}))
            return
        parts = path.strip("/").split("/")
        if path.startswith(f"/api/models/{hub.repo}"):
            self._api(parts[4] if len(parts) > 4 else "revision", parts[5] if len(parts) > 5 else "main")
        elif path.startswith(f"/{hub.repo}/resolve/"):
            self._file(parts[3], "/".join(parts[4:]))
        else:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def _api(self, kind: str, revision: str) -> None:
        commit = self.hub.branches.get(revision, revision)
        if commit not in self.hub.folders:
            self._json({"error": "Invalid rev"}, 404, X_Error_Code="RevisionNotFound")
            return
        root = self.hub.folders[commit]
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if kind == "tree":
            self._json([_entry(root, path) for path in files])
        else:
            names = [{"rfilename": path.relative_to(root).as_posix()} for path in files]
            self._json({"id": self.hub.repo, "modelId": self.hub.repo, "sha": commit, "siblings": names, "tags": []})

    def _file(self, revision: str, name: str) -> None:
        commit = self.hub.branches.get(revision, revision)
        path = self.hub.folders.get(commit, Path("/nowhere")) / name
        if not path.is_file():
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        data, entry = path.read_bytes(), _entry(path.parent, path)
        etag = f'"{entry["oid"]}"'
        headers = {"ETag": etag, "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X_Linked_ETag": f'"{entry["lfs"]["oid"]}"', "X_Linked_Size": str(len(data))}
        wanted = self.headers.get("Range")
        status = 200
        if wanted:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            headers["Content_Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[int(begin) : int(end) + 1], 206
        self.hub.fetched += len(data)
        self._answer(status, data, **headers)


@contextmanager
def run_hub() -> Iterator[FakeHub]:
    """A hub on a free port of loopback; commits and branches can be added while it runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
