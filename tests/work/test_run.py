"""The life of an attempt, around what its step does."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import work
from orchestrator.planning import preparation
from orchestrator.planning.steps import Cause, Kind, Task
from orchestrator.work.context import Context
from orchestrator.work.failures import cause_of
from tests.support.releases import release_spec, tiny_source


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Writes 8 MiB to its scratch folder and fails."""
    monkeypatch.setitem(work.FUNCTIONS, Kind.CONVERT, f"{__name__}:write_much_and_fail")
    plan = preparation.plan(release_spec(tiny_source(tmp_path / "source")))
    return Task(step=next(iter(plan.of_kind(Kind.CONVERT))), inputs={}, attempt=1, store=f"file://{tmp_path}/store")


def write_much_and_fail(_task: Task, context: Context) -> dict[str, Any]:
    context.log("writing")
    np.save(context.scratch / "much.npy", np.zeros(2**20))
    raise ValueError("a bug")


def test_step_that_fails_with_its_scratch_full_lacked_disk(step: Task, small_disk: Path) -> None:
    """numpy's error has no number, torch's no word of a disk."""
    with pytest.raises(OSError, match="no room in the scratch folder of here") as caught:
        work.run(step.model_copy(update={"scratch": str(small_disk)}), print, "here")
    assert caught.value.errno == errno.ENOSPC
    assert cause_of(caught.value) is Cause.DISK
    assert "requested and" in str(caught.value.__cause__)
    assert "writing" in work.log_of(caught.value)
    assert list(small_disk.iterdir()) == []


def test_step_that_fails_with_room_in_its_scratch_fails_by_its_own_error(step: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug") as caught:
        work.run(step.model_copy(update={"scratch": str(tmp_path)}), print, "here")
    assert cause_of(caught.value) is Cause.UNKNOWN
