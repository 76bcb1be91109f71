"""A real Kubernetes API server with its etcd, on loopback: no node, no controller, no pod that runs.

The binary is Kubernetes 1.20 (tests/support/build_kube_apiserver.sh makes it), older than what KubeRay's files are written for:
`for_1_20` and `definition` leave out what it does not know.
"""

from __future__ import annotations

import copy
import functools
import os
import secrets
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.submit.kubernetes.manifests import Fields, at
from orchestrator.work.process import die_with_parent
from tests.support.kuberay import api_schema
from tests.support.s3_server import free_ports

ROOT = Path(__file__).resolve().parents[2]
USERS = {"admin": "system:masters", "submitter": "builders", "outsider": "nobodies"}
"""User -> group. Only an administrator may do anything before roles are bound."""
START_SECONDS = 60.0


def find_apiserver() -> Path | None:
    """ORCHESTRATOR_KUBE_APISERVER, or what `make apiserver` left."""
    named = os.environ.get("ORCHESTRATOR_KUBE_APISERVER")
    path = Path(named) if named else ROOT / ".cache" / "kube-apiserver"
    return path if path.is_file() else None


def skip_reason() -> str | None:
    if find_apiserver() is None:
        return "no kube-apiserver: `make apiserver` builds one, or name it in ORCHESTRATOR_KUBE_APISERVER"
    return None if shutil.which("etcd") else "etcd is not installed: apt-get install etcd-server"


@dataclass
class KubeApiserver:
    """A server that runs; its users' kubeconfig files."""

    folder: Path
    ports: list[int]
    tokens: dict[str, str]
    etcd: subprocess.Popen[bytes] | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.ports[2]}"

    def start(self) -> None:
        """Start the API server; its data is etcd's and outlives it. Returns when it is ready."""
        binary = find_apiserver()
        assert binary is not None
        words = [
            str(binary), f"--etcd-servers=http://127.0.0.1:{self.ports[0]}", f"--secure-port={self.ports[2]}",
            "--bind-address=127.0.0.1", f"--cert-dir={self.folder}/certs", "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes", f"--service-account-signing-key-file={self.folder}/sa.key",
            f"--service-account-key-file={self.folder}/sa.key", f"--token-auth-file={self.folder}/tokens.csv",
            "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
        ]  # fmt: skip
        self.process = _start(words, self.folder / "apiserver.log")
        self._wait_ready()

    def kill(self) -> None:
        """The server vanishes."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for process in (self.process, self.etcd):
            if process is not None:
                process.kill()
                process.wait()

    def kubeconfig(self, user: str) -> Path:
        path = self.folder / f"{user}.kubeconfig"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [
                        {
                            "name": "c",
                            "cluster": {"server": self.url, "certificate-authority": f"{self.folder}/certs/apiserver.crt"},
                        }
                    ],
                    "users": [{"name": user, "user": {"token": self.tokens[user]}}],
                    "contexts": [{"name": user, "context": {"cluster": "c", "user": user}}],
                    "current-context": user,
                }
            )
        )
        return path

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        request = urllib.request.Request(f"{self.url}/readyz", headers={"Authorization": f"Bearer {self.tokens['admin']}"})
        unchecked = ssl.create_default_context()
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE  # its certificate is made while we wait
        while True:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "apiserver.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self.folder / "apiserver.log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(request, timeout=2, context=unchecked):
                    return
            except urllib.error.HTTPError as error:
                error.close()
            except OSError:
                pass
            time.sleep(0.1)


@contextmanager
def run_apiserver(folder: Path) -> Iterator[KubeApiserver]:
    """Start etcd and the API server in `folder`; both are killed when the block or this process ends."""
    tokens = {user: secrets.token_hex(16) for user in USERS}
    (folder / "tokens.csv").write_text("".join(f"{token},{user},{user},{USERS[user]}\n" for user, token in tokens.items()))
    subprocess.run(["openssl", "genrsa", "-out", f"{folder}/sa.key", "2048"], check=True, capture_output=True)
    server = KubeApiserver(folder, free_ports(3), tokens)
    client, peer = (f"http://127.0.0.1:{port}" for port in server.ports[:2])
    words = [
        "etcd", f"--data-dir={folder}/etcd", f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
    ]  # fmt: skip
    try:
        server.etcd = _start(words, folder / "etcd.log")
        server.start()
        yield server
    finally:
        server.close()


def _start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, preexec_fn=die_with_parent)


@functools.cache
def definition(kind: str, plural: str) -> Fields:
    """The CustomResourceDefinition of a kind of ray.io/v1, as far as Kubernetes 1.20 takes it."""
    schema = _for_1_20(copy.deepcopy(api_schema(kind)))
    schema["properties"]["status"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}, "subresources": {"status": {}}}
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.ray.io"},
        "spec": {"group": "ray.io", "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _for_1_20(schema: Any) -> Any:
    """Without CEL rules, and with keys of lists required where a default "" stood in."""
    if isinstance(schema, list):
        return [_for_1_20(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _for_1_20(value) for key, value in schema.items() if key != "x-kubernetes-validations"}
    if made.get("default") == "" and "type" in made:
        del made["default"]
    keys = made.get("x-kubernetes-list-map-keys")
    if isinstance(keys, list):
        items = made["items"]
        defaulted = {name for name, item in items.get("properties", {}).items() if isinstance(item, dict) and "default" in item}
        items["required"] = sorted({*items.get("required", []), *(set(keys) - defaulted)})
    return made


def for_1_20(objects: list[Fields]) -> list[Fields]:
    """Objects without what came later: ranges of ports in network policies (1.22), policy/v1 (1.21)."""
    made = copy.deepcopy(objects)
    for obj in made:
        if obj["kind"] == "PodDisruptionBudget":
            obj["apiVersion"] = "policy/v1beta1"
        if obj["kind"] == "NetworkPolicy":
            for rule in [*(at(obj, "spec.ingress") or []), *(at(obj, "spec.egress") or [])]:
                for port in rule.get("ports", []):
                    port.pop("endPort", None)
    return made
