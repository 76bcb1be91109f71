"""Ceph's RADOS Gateway over https: one monitor, one OSD on a file, one gateway, from Debian's packages. Loopback only.

Debian 12 has Ceph 16: it takes checksums and verifies none but Content-MD5, ignores conditional completions, and refuses the
trailers that botocore sends over https by default. What holds here does not lean on AWS alone. No part is a daemon: all
are children of this process and are ended by their ids.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.s3_server import BUCKET, KEY, SECRET, S3Server, free_ports, wait_ready

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "radosgw ceph-mon ceph-osd"
"""Of Debian."""

_CONFIG = """[global]
fsid={fsid}
mon host = v2:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
ms bind msgr1 = false
ms bind port min = {port_min}
ms bind port max = {port_max}
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 8
osd pool default pgp num = 8
mon max pg per osd = 1000
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}/run
admin socket = {folder}/run/$name.$pid.asok
log file = {folder}/log/$name.log
osd objectstore = bluestore
bluestore block size = 21474836480
osd memory target = 1073741824
mon data avail crit = 1
mon data avail warn = 2
[client.rgw.a]
rgw frontends = beast ssl_endpoint=127.0.0.1:{port} ssl_certificate={folder}/server.pem ssl_private_key={folder}/server.key
rgw data = {folder}/rgw
"""
_KEYS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx"},
    "osd.0": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"},
}


def missing_programs() -> list[str]:
    """What is not installed of what a cluster needs."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def run_ceph(folder: Path) -> Iterator[S3Server]:
    """Start a cluster that keeps its data in `folder`; its processes are killed when the block ends. Raises AssertionError."""
    assert not missing_programs(), f"apt-get install --no-install-recommends {PACKAGES}"
    mon_port, port, port_min = free_ports(3)
    for name in ("mon", "osd", "run", "log", "rgw"):
        (folder / name).mkdir()
    fsid = str(uuid.uuid4())
    values = {"folder": folder, "fsid": fsid, "mon_port": mon_port, "port": port, "port_min": port_min, "port_max": port_min + 20}
    (folder / "ceph.conf").write_text(_CONFIG.format(**values))
    _make_certificate(folder)
    cluster = _Cluster(folder)
    server = S3Server("Ceph RGW", f"https://127.0.0.1:{port}", BUCKET, folder / "ca.pem")
    try:
        cluster.make_mon(fsid, mon_port)
        cluster.make_osd()
        cluster.run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
                    f"--access-key={KEY}", f"--secret-key={SECRET}")  # fmt: skip
        cluster.start("radosgw", "-n", "client.rgw.a")
        wait_ready(server, cluster.processes, lambda: (folder / "log" / "client.rgw.a.log").read_text())
        yield server
    finally:
        cluster.kill()


class _Cluster:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, program: str, *words: str, text: str = "") -> str:
        """A program to its end; its output. Raises AssertionError."""
        command = [program, "-c", f"{self._folder}/ceph.conf", *words]
        if program in {"ceph-authtool", "monmaptool"}:
            command = [program, *words]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
        return done.stdout

    def start(self, program: str, *words: str) -> None:
        """A program that stays, in the foreground."""
        with (self._folder / f"{program}.out").open("wb") as log:
            command = [program, "-f", "-c", f"{self._folder}/ceph.conf", *words]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def kill(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def make_mon(self, fsid: str, port: int) -> None:
        keyring, monmap = f"{self._folder}/keyring", f"{self._folder}/monmap"
        for number, (name, caps) in enumerate(_KEYS.items()):
            made = ["--create-keyring"] if not number else []
            words = [word for kind, cap in caps.items() for word in ("--cap", kind, cap)]
            self.run("ceph-authtool", *made, keyring, "--gen-key", "-n", name, *words)
        self.run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{port}]", "--fsid", fsid, monmap)
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self.start("ceph-mon", "-i", "a")

    def make_osd(self) -> None:
        osd = str(uuid.uuid4())
        secret = self.run("ceph-authtool", f"{self._folder}/keyring", "-n", "osd.0", "-p").strip()
        self.run("ceph", "osd", "new", osd, "0", "-i", "-", text=json.dumps({"cephx_secret": secret}))
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.start("ceph-osd", "-i", "0")


def _make_certificate(folder: Path) -> None:
    """ca.pem, and server.pem with server.key for 127.0.0.1 signed by it; P-256, for a day."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    constraints = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    openssl("req", "-x509", *curve, "-days", "1", "-subj", "/CN=test CA", *constraints, "-keyout", "ca.key", "-out", "ca.pem")
    openssl("req", *curve, "-subj", "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.csr")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\n")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "1", "-extfile", "names", "-out", "server.pem")  # fmt: skip
