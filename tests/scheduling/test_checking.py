"""Inputs that lie on a node: hashed once per build and content, and again after any write."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import DamagedOutputError
from orchestrator.planning.steps import Output
from orchestrator.scheduling.checking import InputChecks, forget

DATA = bytes(range(256)) * 20_000


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "rank0.safetensors"
    path.write_bytes(DATA)
    return path


OUTPUT = Output(name="rank0.safetensors", key="steps/ab/one/rank0.safetensors", num_bytes=len(DATA), sha256=digest_bytes(DATA))


def check(root: Path | None, shard: Path, build_id: str = "build1") -> int:
    """Bytes that an attempt hashed."""
    checks = InputChecks(root, build_id)
    try:
        checks.begin(OUTPUT, shard)
        checks.settle()
    finally:
        checks.close()
    return checks.hashed_bytes


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\0")


def test_begin_attempts_of_one_build_hash_a_file_once(tmp_path: Path, shard: Path) -> None:
    assert check(tmp_path, shard) == len(DATA)
    assert check(tmp_path, shard) == 0
    assert check(tmp_path, shard, "build2") == len(DATA)
    assert check(tmp_path, shard, "") == len(DATA)


def test_begin_eight_attempts_at_once_hash_a_file_once(tmp_path: Path, shard: Path) -> None:
    hashed: list[int] = []
    threads = [threading.Thread(target=lambda: hashed.append(check(tmp_path, shard))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hashed) == [0] * 7 + [len(DATA)]


@pytest.mark.parametrize("time_is_set_back", [False, True])
def test_settle_file_that_was_written_to_after_a_check_is_read_again(tmp_path: Path, shard: Path, time_is_set_back: bool) -> None:
    check(tmp_path, shard)
    before = shard.stat()
    flip(shard)
    if time_is_set_back:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):  # what was found wrong is not remembered as right
        with pytest.raises(DamagedOutputError, match=r"rank0\.safetensors is not what was written: sha256") as caught:
            check(tmp_path, shard)
        assert caught.value.key == OUTPUT.key


def test_settle_file_that_is_gone_or_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedOutputError, match="is gone"):
        check(None, tmp_path / "nothing")
    with pytest.raises(DamagedOutputError, match="cannot be read: Is a directory"):
        check(None, tmp_path)


def test_close_stops_a_hash_that_nobody_waits_for(tmp_path: Path) -> None:
    endless = tmp_path / "pipe"
    os.mkfifo(endless)
    checks = InputChecks(tmp_path, "build1")
    checks.begin(OUTPUT, endless)
    with endless.open("wb", buffering=0) as pipe:
        pipe.write(b"some")
        stopping = threading.Thread(target=checks.close)
        stopping.start()
        while stopping.is_alive():
            try:
                pipe.write(b"more")
            except BrokenPipeError:
                break
        stopping.join(10)
        assert not stopping.is_alive()


@pytest.mark.parametrize("kind", ["open to all", "a link"])
def test_begin_entries_that_others_may_write_are_not_believed(tmp_path: Path, shard: Path, kind: str) -> None:
    name = tmp_path / f"trt-orchestrator-checked-{os.geteuid()}"
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        name.symlink_to(tmp_path / "elsewhere")
    else:
        name.mkdir()
        name.chmod(0o777)
    assert check(tmp_path, shard) == check(tmp_path, shard) == len(DATA)


def test_begin_removes_the_entries_of_builds_that_nobody_runs(tmp_path: Path, shard: Path) -> None:
    running = InputChecks(tmp_path, "running")
    running.begin(OUTPUT, shard)
    check(tmp_path, shard, "ended")
    check(tmp_path, shard, "next")
    (top,) = tmp_path.glob("trt-orchestrator-checked-*")
    assert {folder.name for folder in top.iterdir()} == {"running", "next"}
    running.close()
    for build_id in ("running", "next", "another"):
        forget(tmp_path, build_id)
    assert list(tmp_path.iterdir()) == [shard]
