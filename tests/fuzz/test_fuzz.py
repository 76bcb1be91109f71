"""A few seconds of every fuzzer, of a seed that stays; `python -m tests.fuzz KIND --count N --seed S` goes on from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import FUZZERS

_SECONDS = "5"
"""Of each kind."""


@pytest.mark.parametrize("kind", FUZZERS)
def test_fuzzer_finds_no_traceback_hang_long_message_or_much_memory(kind: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", kind, "--count", "60", "--seconds", _SECONDS]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed," in done.stdout
