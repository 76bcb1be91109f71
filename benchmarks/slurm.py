"""Both job scripts of cluster_configs/ under a real Slurm of two nodes on this machine: a tiny model, with Ray and with MPI.

    python -m benchmarks.slurm

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge; their services need not run. The daemons have a
configuration, keys and ports of their own and end with this program. Of the scripts only the #SBATCH lines that ask for GPUs and
for four nodes are overridden. Printed: how each job ended, and on which nodes its steps ran.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from orchestrator.work.process import die_with_parent
from tests.support.tiny import write_tiny_llama

ROOT = Path(__file__).resolve().parents[1]
_PATIENCE_SECONDS = 60.0


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Two nodes that are this machine under its two names; yields the environment of their commands."""
    host = platform.node().partition(".")[0]
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    socket = folder / "munge.sock"
    nodes = {host: 17901, "localhost": 17902}
    lines = [
        "ClusterName=bench", f"SlurmctldHost={host}(127.0.0.1)", "AuthType=auth/munge", f"AuthInfo=socket={socket}",
        "SlurmUser=root", "SlurmctldPort=17817", f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/ctld.pid", f"SlurmdPidFile={folder}/slurmd.%n.pid", f"SlurmctldLogFile={folder}/ctld.log",
        f"SlurmdLogFile={folder}/slurmd.%n.log", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none",
        "SelectType=select/cons_tres", "ReturnToService=2", "MpiDefault=none",
        *(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={os.cpu_count()}"
            for name, port in nodes.items()
        ),
        f"PartitionName=all Nodes={','.join(nodes)} Default=YES State=UP",
    ]  # fmt: skip
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    munged = ["munged", "--force", "--foreground", f"--key-file={folder}/munge/key", f"--socket={socket}"]
    munged += [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")]
    daemons = []
    try:
        for words in (munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in nodes)):
            daemons.append(
                subprocess.Popen(
                    words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent
                )
            )
            wait_for(socket.exists)
        idle = ["sinfo", "--noheader", "--format=%D %t"]
        wait_for(lambda: "2 idle" in subprocess.run(idle, env=environment, capture_output=True, text=True).stdout)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    """Ask until it is true."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "Slurm did not come up"
        time.sleep(0.1)


def submit(place: str, folder: Path, environment: dict[str, str]) -> None:
    """Run one script to its end and print what came of it."""
    kind = place.removeprefix("slurm-")
    cluster = {"kind": kind, "store": f"store-{kind}", "pools": {"default": {"cpus": 1}}}
    if kind == "ray":
        cluster["address"] = "auto"
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(cluster))
    text = (ROOT / "cluster_configs" / place / "job.sbatch").read_text()
    script, log = folder / f"{kind}.sbatch", folder / f"{kind}.log"
    script.write_text(re.sub(r"#SBATCH --gpus-per-node=.*\n", "", text))
    words = [
        "sbatch",
        "--wait",
        "--nodes=2",
        f"--output={log}",
        str(script),
        str(folder / "spec.yaml"),
        str(folder / f"{kind}.yaml"),
    ]
    began = time.monotonic()
    done = subprocess.run(words, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
    said = log.read_text() if log.exists() else ""
    if done.returncode:
        print(said)
        raise SystemExit(f"{place}: the job ended with {done.returncode}")
    nodes = sorted(set(re.findall(r": [0-9.]+ s on (\S+)", said)))
    assert "\npublished: " in said
    assert not list(folder.glob(".ray-token-*")), "the token outlived its job"
    print(f"{place}: published after {time.monotonic() - began:.0f} s; steps ran on {', '.join(nodes)}")


def main() -> None:
    """Start Slurm, submit both, end Slurm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise SystemExit(f"needs root, and Debian's slurmctld, slurmd, slurm-client and munge (missing: {missing})")
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_tiny_llama(folder / "llama")
        spec = {
            "source": {"path": "llama"}, "topology": {"tp": 2}, "release": {"name": "tiny", "version": "1"},
            "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
            "verification": {"max_tokens": 12, "decode_steps": 3},
        }  # fmt: skip
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
        with slurm(folder) as environment:
            for place in ("slurm-mpi", "slurm-ray"):
                submit(place, folder, environment)


if __name__ == "__main__":
    main()
