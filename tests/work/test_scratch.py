"""Scratch folders: a dead process's is removed by the next that comes, a living one's never."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import work
from orchestrator.clusters.local import LocalCluster
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind, Task
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.work import scratch
from orchestrator.work.context import Context
from orchestrator.work.probe import probe_here
from orchestrator.work.scratch import remove_dead, scratch_folder
from tests.support.releases import release_spec, tiny_source

OWNER = """
import sys
from orchestrator.work.scratch import scratch_folder
with scratch_folder(sys.argv[1], "0123abcd") as folder:
    (folder / "half").write_bytes(b"written")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(root: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a scratch folder."""
    words = [sys.executable, "-c", OWNER, str(root)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def dead_folder(root: Path) -> Path:
    with owner(root) as (process, folder):
        process.kill()
        process.wait()
    assert (folder / "half").exists()
    return folder


def test_scratch_of_a_killed_process_is_removed_by_the_next_visit(tmp_path: Path) -> None:
    folder = dead_folder(tmp_path)
    assert "0123abcd" in folder.name
    assert remove_dead(tmp_path) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_scratch_of_a_living_process_is_kept(tmp_path: Path) -> None:
    with owner(tmp_path) as (_, folder), scratch_folder(tmp_path) as mine:
        assert remove_dead(tmp_path) == []
        assert (folder / "half").exists()
        assert mine.is_dir()
    assert not mine.exists()


def test_scratch_of_a_dying_process_is_waited_for_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(tmp_path) as (process, folder):

        def die(seconds: float) -> None:
            process.kill()
            process.wait()

        monkeypatch.setattr(scratch.time, "sleep", die)
        assert remove_dead(tmp_path, patience_seconds=60.0) == [folder]
    assert not folder.exists()


def test_scratch_of_a_stopped_process_is_kept(tmp_path: Path) -> None:
    """It may go on."""
    with owner(tmp_path) as (process, folder):
        os.kill(process.pid, signal.SIGSTOP)
        assert remove_dead(tmp_path) == []
        assert folder.is_dir()


def test_scratch_that_others_keep_under_names_of_theirs_is_kept(tmp_path: Path) -> None:
    names = ["step-abc", "trt-orchestrator-notes", "trt-orchestrator-0123abcd-0123456789abc"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "trt-orchestrator--0123456789ab").write_text("a file")
    assert remove_dead(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 4


def test_scratch_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "trt-orchestrator--0123456789ab").symlink_to(precious)
    assert remove_dead(tmp_path / "root") == []
    assert (precious / "file").read_text() == "kept"


def test_scratch_taken_for_dead_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not calls:
            calls.append(how)
            assert len(remove_dead(tmp_path)) == 1
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir()


def test_scratch_root_that_is_not_there_has_nothing_dead(tmp_path: Path) -> None:
    assert remove_dead(tmp_path / "nowhere") == []


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A convert step."""
    plan = preparation.plan(release_spec(tiny_source(tmp_path / "source")))
    root = tmp_path / "scratch"
    root.mkdir()
    step = next(iter(plan.of_kind(Kind.CONVERT)))
    return Task(step=step, inputs={}, attempt=1, store=f"file://{tmp_path}/store", scratch=str(root), build_id="89abcdef")


def test_step_removes_what_killed_ones_left_and_names_its_own_scratch(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task.scratch is not None
    dead, seen = dead_folder(Path(task.scratch)), []

    def convert(_task: Task, context: Context) -> dict[str, object]:
        seen.append(context.scratch)
        return {}

    monkeypatch.setattr(work.importlib, "import_module", lambda name: type("module", (), {"convert": convert}))
    work.run(task, print)
    assert not dead.exists()
    assert "89abcdef" in seen[0].name
    assert list(Path(task.scratch).iterdir()) == []


def test_probe_of_a_node_removes_what_killed_steps_left(tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    root.mkdir()
    dead = dead_folder(root)
    probe_here((tmp_path / "store").as_uri(), "{}", str(root), [])
    assert not dead.exists()


def test_local_cluster_that_is_closed_leaves_no_scratch_of_the_steps_that_it_killed(task: Task, tmp_path: Path) -> None:
    assert task.scratch is not None
    root, fifo = Path(task.scratch), tmp_path / "source" / "model.safetensors"
    fifo.unlink()
    os.mkfifo(fifo)  # the step waits for its source
    cluster = LocalCluster(ClusterSpec(store=task.store, scratch=task.scratch))
    cluster.start(task)
    assert cluster.events(60)[0].event == "started"
    seen = threading.Event()
    while not list(root.iterdir()):
        seen.wait(0.01)
    cluster.close()
    assert list(root.iterdir()) == []
