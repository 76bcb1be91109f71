"""Builds under a real mpiexec of three processes: one drives, two are nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.base.errors import ClusterError
from orchestrator.clusters.mpi import LABELS_VARIABLE, MpiCluster, accelerator_type
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.work.process import without_launcher
from tests.support.mpi import find_mpiexec

PATIENCE_SECONDS = 400.0
ROOT = Path(__file__).resolve().parents[2]
POOL = [sys.executable, "-m", "mpi4py.futures"]


@contextlib.contextmanager
def world(*words: str, options: tuple[str, ...] = (), log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`mpiexec` over `python -m mpi4py.futures WORDS` as rank 0 and two nodes, the second with a label of its own."""
    node = [*POOL, "-c", "pass"]
    command = [find_mpiexec(), *options, "-n", "1", *POOL, *words, ":", "-n", "1", *node, ":"]
    command += ["-n", "1", "-env", LABELS_VARIABLE, "role=second", *node]
    environment = {**without_launcher(os.environ), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.slow
def test_mpi_cluster_keeps_the_contract_in_a_world_of_three(log: Path) -> None:
    suite = "tests/integration/mpi_world.py"
    with world("-m", "pytest", "-q", suite, log=log) as process:
        code = process.wait(PATIENCE_SECONDS)
    assert code == 0, log.read_text()
    expected = (ROOT / suite).read_text().count("\ndef test_") + (ROOT / "tests/contracts/cluster_contract.py").read_text().count(
        "    def test_"
    )
    assert f"{expected} passed" in log.read_text()


def build_words(folder: Path, source: Path) -> list[str]:
    """Write a spec and a cluster file; returns the words of `orchestrator build` with them."""
    spec = {
        "source": {"path": str(source)}, "topology": {"tp": 2}, "conversion": {"max_shard_bytes": "200KB"},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"max_tokens": 12, "decode_steps": 3}, "release": {"name": "tiny", "version": "1"},
    }  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"kind": "mpi", "store": "store", "pools": {"default": {"cpus": 1}}}))
    return ["-m", "orchestrator.cli", "build", str(folder / "spec.yaml"), "--cluster", str(folder / "cluster.yaml"), "--json"]


def events_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def wait_for_start(log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(event["event"] == "succeeded" for event in events_of(log)):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def processes_with(word: str) -> list[int]:
    """Pids of processes whose environment or command holds `word`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if word.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_build_whose_node_is_killed_ends_and_goes_on_when_it_is_run_again(
    tiny_llama: Path, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the whole job. The second run does what is left: conversions on two nodes, engines, verification."""
    words = build_words(tmp_path, tiny_llama)
    mark = f"ORCHESTRATOR_TEST={tmp_path.name}-{os.getpid()}"
    monkeypatch.setenv(*mark.split("="))
    with world(*words, log=log) as process:
        wait_for_start(log)
        (victim,) = [pid for pid in processes_with(f"{LABELS_VARIABLE}=role=second") if pid in is_node(mark)]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(PATIENCE_SECONDS) != 0
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left := processes_with(mark):
        assert time.monotonic() < deadline, f"{left} outlived their job"
        time.sleep(0.02)
    before = {event["outcome"]["name"] for event in events_of(log) if event["event"] == "succeeded"}
    log.unlink()
    with world(*words, log=log) as process:
        code = process.wait(PATIENCE_SECONDS)
    assert code == 0, log.read_text()
    events = events_of(log)
    after = {event["outcome"]["name"] for event in events if event["event"] == "succeeded"}
    assert before
    assert before.isdisjoint(after), "a committed step was run again"
    assert {name.partition("/")[0] for name in before | after} == {"miniature", "reference", "convert", "build", "verify"}
    assert events[-1]["event"] == "published"
    assert events[-1]["verification"]["top1_agreement"] == 1.0
    assert len({event["node"] for event in events if event["event"] == "started"}) == 2


def test_build_whose_node_falls_silent_ends_with_the_reason(log: Path, store_url: str) -> None:
    with world("tests/integration/mpi_lost_node.py", store_url, log=log) as process:
        code = process.wait(PATIENCE_SECONDS)
    assert code == ClusterError.exit_code
    assert "a node of the MPI job was lost: rank" in log.read_text()
    assert "silent for more than 3 s | An MPI job cannot continue without it. Run the same command again" in log.read_text()


def is_node(mark: str) -> list[int]:
    """Pids of the job's own processes, without the steps that they run."""
    return [pid for pid in processes_with(mark) if b"mpi4py.futures" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_mpi_cluster_in_a_process_of_no_job_is_refused(store_url: str) -> None:
    with pytest.raises(ClusterError, match="at least two processes") as caught:
        MpiCluster(ClusterSpec(kind="mpi", store=store_url))
    assert "python -m mpi4py.futures" in caught.value.advice


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H100 80GB HBM3", "NVIDIA L40S", "Tesla V100-SXM2-16GB", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090",
     "NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA L4", "NVIDIA GB200"],
)  # fmt: skip
def test_accelerator_type_is_the_label_that_ray_gives(name: str) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    assert accelerator_type(name) == NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name)
