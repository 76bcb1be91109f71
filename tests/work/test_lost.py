"""What became of a process that ended without a word: by evidence."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.planning.steps import Cause, FailureKind
from orchestrator.work import lost
from orchestrator.work.lost import crash, memory_group, oom_kills
from tests.support.memory_groups import MemoryGroup, place_for_groups


@pytest.mark.parametrize(
    ("code", "kills", "cause", "told"),
    [
        (-9, 0, Cause.WORKER, "was ended by SIGKILL"),
        (-9, 1, Cause.MEMORY, "was killed for memory by the kernel"),
        (-11, 1, Cause.WORKER, "was ended by SIGSEGV"),
        (3, 0, Cause.WORKER, "exited with code 3"),
    ],
)
def test_crash_of_a_step_is_for_memory_only_where_the_kernel_killed(code: int, kills: int, cause: Cause, told: str) -> None:
    failure = crash(code, "node", io.BytesIO(b"last words"), kills)
    assert (failure.kind, failure.cause, failure.log_tail) == (FailureKind.INFRASTRUCTURE, cause, "last words")
    assert told in failure.message


def test_count_of_killed_processes_is_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\noom 4\noom_kill 2\n")
    monkeypatch.setattr(lost, "_COUNTS", (f"{tmp_path}/none{{group}}", f"{tmp_path}{{group}}/memory.events"))
    assert oom_kills("") == 2
    assert oom_kills("/nowhere") == 0


GREEDY = "import sys; open(sys.argv[1], 'w').write('0'); data = bytearray(2**28)"


def test_count_of_killed_processes_rises_when_the_kernel_kills_one_for_memory() -> None:
    if place_for_groups() is None:
        pytest.skip("no control group for memory can be made here")
    group = MemoryGroup(f"lost-{os.getpid()}")
    try:
        group.limit(2**26)
        own = memory_group(Path("/proc/self/cgroup").read_text()).rstrip("/") + f"/{group.folder.name}"
        before = oom_kills(own)
        done = subprocess.run([sys.executable, "-c", GREEDY, str(group.entrance)])
        kills = oom_kills(own) - before
        assert (done.returncode, kills) == (-signal.SIGKILL, 1)
        assert crash(done.returncode, "node", io.BytesIO(), kills).cause is Cause.MEMORY
    finally:
        group.remove()
