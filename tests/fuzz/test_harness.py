"""The judge of the fuzzers: what it must not let pass, planted; and that a case can be run again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from orchestrator.base.errors import OrchestratorError, SpecError
from tests.fuzz import FUZZERS, harness
from tests.fuzz.harness import open_fuzzer, run_command
from tests.support.ordinary_user import ordinary_user


def _raise(_words: tuple[str, ...]) -> int:
    raise KeyError("x")


def _print_traceback(_words: tuple[str, ...]) -> int:
    print("Traceback (most recent call last):", file=sys.stderr)
    return SpecError.exit_code


def _sleep(_words: tuple[str, ...]) -> int:
    time.sleep(60)
    return 0


def _allocate(_words: tuple[str, ...]) -> int:
    return len(b"x" * (harness.MEMORY_BYTES + 2**27)) * 0


def _crash(_words: tuple[str, ...]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        (_raise, "traceback"),
        (_print_traceback, "traceback"),
        (_sleep, "hangs"),
        (_allocate, "GB of memory"),
        (_crash, "killed by SIGKILL"),
        (lambda _: OrchestratorError.exit_code, "exit code 1"),
        (lambda _: 77, "exit code 77"),
        (lambda _: print("x" * 4096, file=sys.stderr) or SpecError.exit_code, "a message of 4,097 bytes"),
        (lambda _: print("x" * 4097) or 0, "a message of 4,097 bytes"),
    ],
    ids=["raises", "prints a traceback", "hangs", "allocates", "crashes", "a bug", "unknown code", "long error", "long line"],
)
def test_harness_of_a_command_that_misbehaves_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: object, problem: str
) -> None:
    monkeypatch.setattr(harness, "TIMEOUT_SECONDS", 0.3)
    (tmp_path / "case").mkdir()
    assert callable(planted)
    if planted is _allocate:
        monkeypatch.setattr(harness, "TIMEOUT_SECONDS", 20.0)
    assert problem in run_command((), tmp_path / "case", planted).problem


@pytest.mark.parametrize("code", [0, 2, SpecError.exit_code])
def test_harness_of_a_command_that_ends_as_documented_finds_no_problem(tmp_path: Path, code: int) -> None:
    (tmp_path / "case").mkdir()
    assert run_command((), tmp_path / "case", lambda _: code).problem == ""


def test_harness_lets_modes_of_files_hold_for_commands(tmp_path: Path) -> None:
    secret = tmp_path / "case" / "secret"
    secret.parent.mkdir()
    secret.touch(mode=0)
    assert b"PermissionError" in run_command((), secret.parent, lambda _: len(secret.read_bytes())).stderr
    with ordinary_user(), pytest.raises(PermissionError):
        secret.read_bytes()
    secret.chmod(0o600)
    assert secret.read_bytes() == b""


@pytest.mark.parametrize("kind", FUZZERS)
def test_fuzzers_make_the_same_case_of_the_same_seed(tmp_path: Path, kind: str) -> None:
    fuzzer = open_fuzzer(kind)
    (tmp_path / "base").mkdir()
    fuzzer.prepare(tmp_path / "base")
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        commands = fuzzer.make(random.Random("seed"), folder)
        made.append((commands, {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}))
    assert made[0] == made[1]
    assert made[0][0]
