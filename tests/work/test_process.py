"""A step's process and its place."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from orchestrator.work.process import scratch_root


def test_scratch_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    wanted = tmp_path / "nvme" / "scratch"
    assert scratch_root(str(wanted)) == str(wanted)
    assert wanted.is_dir()
    assert scratch_root(None) == tempfile.gettempdir()


def test_scratch_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        scratch_root(str(tmp_path / "file" / "scratch"))
