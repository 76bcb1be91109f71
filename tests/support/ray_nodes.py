"""Several real Ray nodes on one machine: each in network, process, mount, host-name and shared-memory namespaces of its own.

So a node can vanish (SIGKILL), be taken back (SIGTERM), be cut off (its link goes down) or come back, as on real machines.
All see one file system; a folder of the bed is the store. Every node has its own /tmp/ray, /dev/shm and scratch. Processes are
ended by their ids, and end with the process that made the bed. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.work.process import die_with_parent
from tests.support.memory_groups import MemoryGroup, place_for_groups

HEAD = 1
GUEST = 200
"""Number of a machine on the nodes' network that is no node: what runs there is reached as over any network."""
_ROOT = Path(__file__).resolve().parents[2]
_BIN = Path(sys.executable).parent
_PORT, _DASHBOARD_PORT = 6379, 8265
_READY_SECONDS = 120.0
_POLL_SECONDS = 0.1
_PREFIX = "raybed"
_INSIDE = """
hostname "$1"; ip link set lo up
mount -t tmpfs -o size=2g tmpfs /dev/shm
# `ip netns exec` mounts another /sys, without the control groups that every real node has.
if [ "$(awk '$1 == "memory" {print $2}' /proc/cgroups)" != 0 ]; then
  mount -t tmpfs tmpfs /sys/fs/cgroup
  mkdir /sys/fs/cgroup/memory
  mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory
else
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
mount --bind "$2" /tmp/ray
mount -t tmpfs -o size="$4" tmpfs "$3"
shift 4; exec "$@"
"""
"""What the first process of a node does; then it becomes `ray start`."""
_ENTER = 'echo $$ > "$1"; shift; exec "$@"'
"""Before it has namespaces of its own: into the node's control group."""


def skip_reason() -> str | None:
    """Why no bed can be made here; None when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    missing = [program for program in ("ip", "unshare", "nsenter", "mount") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return None if probe.returncode == 0 else "namespaces are not allowed here"


@dataclass(frozen=True)
class BedOptions:
    """What the nodes of a bed have."""

    num_nodes: int = 3
    head_cpus: int = 1
    worker_cpus: int = 2
    worker_gpus: int = 0
    """Pretended ones: Ray hands them out, nothing can run on them."""
    scratch_bytes: int = 256 * 2**20
    """Of each node's own scratch file system."""
    drain_seconds: int = 30
    """How long a node that was asked to end (SIGTERM) lets its work finish."""
    environment: tuple[tuple[str, str], ...] = ()
    """More variables for every node."""


class RayNodes:
    """A cluster of `num_nodes` nodes; node 1 is the head, its state is kept on disk. Use `ray_nodes()`."""

    def __init__(self, options: BedOptions) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-"))
        self.scratch = self.folder / "scratch"
        """The same path on every node, another file system on each."""
        self.store_url = (self.folder / "store").as_uri()
        self._number = _claim_number()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._beside: list[subprocess.Popen[Any]] = []
        self._cut: set[int] = set()
        self._groups: dict[int, MemoryGroup] = {}
        self._token = secrets.token_hex(32)

    # Addresses and environment

    def ip(self, node: int) -> str:
        return f"10.77.{self._number}.{node}"

    @property
    def address(self) -> str:
        """Of the cluster, for a driver in a node."""
        return f"{self.ip(HEAD)}:{_PORT}"

    @property
    def dashboard(self) -> str:
        """URL of the job API; this process reaches it too."""
        return f"http://{self.ip(HEAD)}:{_DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client or a driver needs besides its own environment."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_PROXY": f"127.0.0.1,localhost,10.77.{self._number}.0/24,{self.ip(HEAD)},{self.ip(GUEST)}",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            "PYTHONPATH": f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
        }

    # Life of the bed

    def up(self) -> None:
        """Make the network and start every node. Raises AssertionError when they are not there in time."""
        for name in ("gcs", "store", "scratch"):
            (self.folder / name).mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)  # where each node mounts its own
        _sh("ip", "addr", "add", f"{self.ip(254)}/24", "dev", self._bridge)
        _sh("ip", "link", "set", self._bridge, "up")
        for node in self.nodes:
            self._plug(node)
            if place_for_groups() is not None:
                self._groups[node] = MemoryGroup(f"{self._bridge}-{node}")
        self.start(HEAD)
        self.wait(lambda: self._head_answers(), "the head's port")
        for node in self.nodes[1:]:
            self.start(node)
        self._wait_all()

    @property
    def nodes(self) -> list[int]:
        return list(range(1, self.options.num_nodes + 1))

    def start(self, node: int) -> None:
        """Start a node, the head on the state that its predecessor left."""
        assert node not in self._processes, f"node {node} runs"
        ray_folder = self.folder / f"ray{node}"
        ray_folder.mkdir(exist_ok=True)
        words = [
            "ip", "netns", "exec", self._namespace(node),
            "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--uts", "--ipc",
            "bash", "-c", _INSIDE, "node", f"node{node}", str(ray_folder), str(self.scratch), str(self.options.scratch_bytes),
            str(_BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--node-ip-address={self.ip(node)}",
            *self._ray_options(node),
        ]  # fmt: skip
        if node in self._groups:
            words = ["bash", "-c", _ENTER, "enter", str(self._groups[node].entrance), *words]
        with self.log(node).open("ab") as log:
            self._processes[node] = subprocess.Popen(
                words, env=self._node_environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
            )

    def plug_guest(self) -> tuple[str, ...]:
        """Make the guest's place on the network; the words before a program that is to run there. `cut` and `connect` know it."""
        self._plug(GUEST)
        _sh("ip", "-n", self._namespace(GUEST), "link", "set", "lo", "up")
        return ("ip", "netns", "exec", self._namespace(GUEST))

    def restore(self) -> None:
        """Bring back whatever is missing: links, nodes, room in scratch."""
        for group in self._groups.values():
            group.limit(None)
        for node in list(self._cut):  # a worker that was cut off ends itself sooner or later
            self.connect(node)
            if node in self.nodes[1:]:
                self.kill(node)
        if HEAD not in self._processes:
            self.start(HEAD)
        self.wait(lambda: self._head_answers(), "the head's port")
        self.wait(lambda: bool(self.alive()), "the head's state")
        for node in self.nodes:
            if node in self._processes and node not in self.alive():
                self.kill(node)  # it lives, and the cluster has given it up
            if node not in self._processes:
                self.start(node)
        self._wait_all()
        for node in self.nodes:
            self.free_scratch(node)

    def down(self) -> None:
        """End every process and remove everything. Idempotent."""
        for process in list(self._beside):
            self.kill_process(process)
        for process in self._processes.values():
            process.kill()
        for node in list(self._processes):
            self.kill(node)
        for group in self._groups.values():
            group.remove()
        _remove_network(self._number)
        shutil.rmtree(self.folder, ignore_errors=True)

    # Faults

    def kill(self, node: int) -> None:
        """The machine vanishes."""
        process = self._processes.pop(node)
        inner = _children(process.pid)
        process.kill()
        process.wait()
        self.wait(lambda: not any(Path(f"/proc/{child}").exists() for child in inner), f"the end of node {node}")

    def terminate(self, node: int) -> None:
        """The machine is taken back: work that runs may finish within drain_seconds. Returns at once."""
        os.kill(self.first_process(node), signal.SIGTERM)

    def wait_ended(self, node: int) -> None:
        """Wait for a node that was terminated."""
        process = self._processes[node]
        self.wait(lambda: process.poll() is not None, f"the end of node {node}")
        self._processes.pop(node)

    def cut(self, node: int) -> None:
        """Nothing reaches the node, and it reaches nothing; what runs there runs on."""
        _sh("ip", "link", "set", self._cable(node), "down")
        self._cut.add(node)

    def connect(self, node: int) -> None:
        _sh("ip", "link", "set", self._cable(node), "up")
        self._cut.discard(node)

    def fill_scratch(self, node: int) -> None:
        """Leave no room in the scratch of a node."""
        self.run(node, "dd", "if=/dev/zero", f"of={self.scratch}/fill", "bs=1M", "status=none")

    def free_scratch(self, node: int) -> None:
        self.run(node, "rm", "-f", f"{self.scratch}/fill")

    def limit_memory(self, node: int, more_bytes: int) -> None:
        """All processes of a node together may hold so much more than they hold now: the kernel kills one if they try to.

        Raises KeyError where there are no control groups; programs of `popen` and `run` are outside of it.
        """
        group = self._groups[node]
        group.limit(group.used_bytes + more_bytes)

    @property
    def limits_memory(self) -> bool:
        """Whether limit_memory works here."""
        return bool(self._groups)

    # Looking and running

    def log(self, node: int) -> Path:
        """What `ray start` said."""
        return self.folder / f"node{node}.log"

    def first_process(self, node: int) -> int:
        """Id, here, of the process that is number 1 of the node."""
        self.wait(lambda: bool(_children(self._processes[node].pid)), f"the first process of node {node}")
        return _children(self._processes[node].pid)[0]

    def popen(self, node: int, *words: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program in a node: it sees its network, processes and scratch, and ends with it and with this process."""
        target = ["nsenter", f"--target={self.first_process(node)}", "--net", "--mount", "--pid", "--uts", "--ipc"]
        environment = {**self._node_environment(), "RAY_ADDRESS": self.address, **options.pop("env", {})}
        process = subprocess.Popen([*target, "--wd=" + str(_ROOT), *words], env=environment, preexec_fn=die_with_parent, **options)
        self._beside.append(process)
        return process

    def kill_process(self, process: subprocess.Popen[Any]) -> None:
        """SIGKILL to a program of `popen`, which is the child of the one that entered the node's namespaces."""
        for child in _children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait()
        if process in self._beside:
            self._beside.remove(process)

    def run(self, node: int, *words: str, timeout_seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a program in a node to its end."""
        process = self.popen(node, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = process.communicate(timeout=timeout_seconds)
        self._beside.remove(process)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def alive(self) -> set[int]:
        """Nodes that the cluster holds for alive; empty while the head does not answer."""
        query = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        try:
            found = self._get(f"/api/v0/nodes?{query}")["data"]["result"]["result"]
        except (OSError, ValueError, TypeError, KeyError):
            return set()
        return {int(node["node_ip"].rpartition(".")[2]) for node in found}

    def wait_alive(self, *nodes: int) -> None:
        """Wait until exactly these nodes are alive in the cluster's eyes."""
        self.wait(lambda: self.alive() == set(nodes), f"nodes {nodes}")

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = _READY_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                tails = {log.name: log.read_text(errors="replace")[-600:] for log in sorted(self.folder.glob("node*.log"))}
                raise AssertionError(f"waited {seconds:.0f} s for {what}; {tails}")
            time.sleep(_POLL_SECONDS)

    # Inside

    def _wait_all(self) -> None:
        """Wait for every node; one that gives up on a busy machine before the others answer is started again."""

        def ready() -> bool:
            for node, process in list(self._processes.items()):
                if process.poll() is not None:
                    self._processes.pop(node)
                    self.start(node)
            return self.alive() == set(self.nodes)

        self.wait(ready, "all nodes", 2 * _READY_SECONDS)

    @property
    def _bridge(self) -> str:
        return f"{_PREFIX}{self._number}"

    def _namespace(self, node: int) -> str:
        return f"{self._bridge}-{node}"

    def _cable(self, node: int) -> str:
        return f"{self._bridge}c{node}"

    def _plug(self, node: int) -> None:
        name, cable = self._namespace(node), self._cable(node)
        known = "".join(f"{self.ip(other)} node{other}\n" for other in self.nodes)
        etc = Path("/etc/netns") / name
        etc.mkdir(parents=True, exist_ok=True)
        # Without these the dashboard waits for a name server that is not there.
        (etc / "resolv.conf").write_text("options timeout:1 attempts:1\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        _sh("ip", "netns", "add", name)
        _sh("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _sh("ip", "link", "set", cable, "master", self._bridge, "up")
        _sh("ip", "-n", name, "addr", "add", f"{self.ip(node)}/24", "dev", "eth0")
        _sh("ip", "-n", name, "link", "set", "eth0", "up")

    def _ray_options(self, node: int) -> list[str]:
        options, memory = self.options, "--object-store-memory=100000000"
        if node == HEAD:
            head = ["--head", f"--port={_PORT}", "--dashboard-host=0.0.0.0", f"--dashboard-port={_DASHBOARD_PORT}"]
            return [*head, f"--num-cpus={options.head_cpus}", "--num-gpus=0", "--labels=role=head", memory]
        labels = f"--labels=role=worker,index={node}"
        return [
            f"--address={self.address}",
            f"--num-cpus={options.worker_cpus}",
            f"--num-gpus={options.worker_gpus}",
            labels,
            memory,
        ]

    def _node_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        mine = self.environment
        del mine["RAY_ADDRESS"]  # `ray start` would take it for the cluster to join
        # Ray's own patience with a silent node is over a minute.
        health = {"initial_delay_ms": "1000", "period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "3"}
        return {
            **inherited,
            **mine,
            **{f"RAY_health_check_{name}": value for name, value in health.items()},
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.folder / "gcs"),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self.options.drain_seconds),
            **dict(self.options.environment),
        }

    def _head_answers(self) -> bool:
        import socket

        with contextlib.suppress(OSError), socket.create_connection((self.ip(HEAD), _PORT), timeout=1.0):
            return True
        return False

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self._token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=5.0) as answer:
            return json.load(answer)


@contextlib.contextmanager
def ray_nodes(options: BedOptions | None = None) -> Iterator[RayNodes]:
    """A bed that is up; nothing of it is left when the block ends."""
    bed = RayNodes(options or BedOptions())
    try:
        bed.up()
        yield bed
    finally:
        bed.down()


def _claim_number() -> int:
    """A free number: making the bridge of that name is the claim. Beds whose maker is gone are removed first."""
    for link in _links():
        owner = link.get("ifalias", "")
        if link["ifname"].removeprefix(_PREFIX).isdigit() and owner and not Path(f"/proc/{owner}").exists():
            _remove_network(int(link["ifname"].removeprefix(_PREFIX)))
    for number in range(1, 250):
        bridge = f"{_PREFIX}{number}"
        if subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True).returncode == 0:
            _sh("ip", "link", "set", bridge, "alias", str(os.getpid()))
            return number
    raise AssertionError("no free number for a bed: remove left bridges with `ip link del`")


def _remove_network(number: int) -> None:
    bridge = f"{_PREFIX}{number}"
    cables = [link["ifname"] for link in _links() if link["ifname"].startswith(f"{bridge}c")]
    for cable in cables:  # a namespace with closing sockets outlives `ip netns del`; its cable must not
        subprocess.run(["ip", "link", "del", cable], capture_output=True)
    for etc in Path("/etc/netns").glob(f"{bridge}-*"):
        subprocess.run(["ip", "netns", "del", etc.name], capture_output=True)
        shutil.rmtree(etc, ignore_errors=True)
    subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def _links() -> list[dict[str, Any]]:
    listed = subprocess.run(["ip", "-json", "link", "show"], check=True, capture_output=True, text=True).stdout
    return [link for link in json.loads(listed or "[]") if link.get("ifname", "").startswith(_PREFIX)]


def _children(process_id: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]
    except OSError:
        return []


def _sh(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
