"""Runs cases through the command line, each in a forked child of its own, and judges what came of them.

A case passes when every command of it ends in time, with success or the exit code of an OrchestratorError, without a traceback,
with short messages and little memory. A case is a function of its kind, seed and number alone, so any can be run again.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, Protocol

from orchestrator.base.errors import OrchestratorError, error_classes
from tests.fuzz import FUZZERS
from tests.support.ordinary_user import give_up_powers

TIMEOUT_SECONDS = 20.0
_WAITING = 6
"""A command that computes may take TIMEOUT_SECONDS of CPU, one that waits so many times that: machines are shared."""
MESSAGE_BYTES = 4096
MEMORY_BYTES = 10**9
_ESCAPED = 97
"""Exit code of a child whose command let an exception out."""
_USAGE = 2
_ADDRESS_ROOM_BYTES = 4 * 10**9
"""Beyond what the parent has mapped: a stop before the machine suffers, well above what is judged."""


class Fuzzer(Protocol):
    """A kind of hostile input."""

    def prepare(self, folder: Path) -> None:
        """Make once what all cases start from, and import what commands import, so that children need not."""
        ...

    def make(self, rng: random.Random, folder: Path) -> Sequence[Sequence[str]]:
        """Write a case into the empty `folder`, from `rng` alone; returns the command lines to run there, one after the other."""
        ...


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    words: tuple[str, ...]
    code: int
    """Exit code; minus the signal's number for a killed one."""
    stdout: bytes
    stderr: bytes
    memory_bytes: int
    """Peak of its memory, beyond what it was forked with."""

    @property
    def problem(self) -> str:
        """Why the case fails; empty when it does not."""
        legal = {0, _USAGE, *(cls.exit_code for cls in error_classes().values() if cls is not OrchestratorError)}
        if self.code == -signal.SIGPROF:
            return f"hangs: no end within {TIMEOUT_SECONDS:g} s of CPU"
        if self.code == -signal.SIGALRM:
            return f"hangs: no end within {TIMEOUT_SECONDS * _WAITING:g} s"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        if self.code == _ESCAPED or b"Traceback (most recent call last)" in self.stdout + self.stderr:
            return "traceback"
        if self.code not in legal:
            return f"exit code {self.code}, which no error of ours has"
        if self.memory_bytes > MEMORY_BYTES:
            return f"{self.memory_bytes / 1e9:.1f} GB of memory"
        # What a command was asked for as JSON is data, not a message.
        longest = 0 if self.code == 0 and "--json" in self.words else max(map(len, self.stdout.split(b"\n")))
        if len(self.stderr) > MESSAGE_BYTES or longest > MESSAGE_BYTES:
            return f"a message of {max(len(self.stderr), longest):,} bytes"
        return ""


def open_fuzzer(kind: str) -> Fuzzer:
    """The fuzzer of a kind of FUZZERS."""
    module, name = FUZZERS[kind]
    made: Fuzzer = getattr(importlib.import_module(module), name)()
    _command()
    return made


def apart(function: Callable[[], object]) -> None:
    """Call a function in a child, to whose process what it imports and allocates is confined. Raises RuntimeError."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{function} failed in its process")


def run_case(fuzzer: Fuzzer, kind: str, seed: int, number: int, folder: Path) -> Iterator[Ended]:
    """Make case `number` in `folder`, whose earlier content is removed, and run its commands."""
    remove(folder)
    folder.mkdir(parents=True)
    for words in fuzzer.make(random.Random(f"{kind}:{seed}:{number}"), folder):
        yield run_line(words, folder)


def run_line(words: Sequence[str], folder: Path) -> Ended:
    """Run `orchestrator WORDS` in a folder."""
    return run_command(tuple(words), folder, _command_line)


def remove(folder: Path) -> None:
    """Remove a case, with the folders in it that nobody may enter."""
    if not folder.is_dir():
        return
    for path, _, _ in os.walk(folder):
        Path(path).chmod(0o700)
    shutil.rmtree(folder)


def run_command(words: tuple[str, ...], folder: Path, run: Callable[[tuple[str, ...]], int]) -> Ended:
    """Call `run` in a child that `folder` is the working directory of, under limits of time and memory."""
    outputs = [folder.parent / f"{folder.name}.{name}" for name in ("stdout", "stderr")]
    inherited = folder.parent / f"{folder.name}.inherited"
    child = os.fork()
    if child == 0:
        # The child counts: it shares only a part of what the parent holds.
        inherited.write_text(str(_memory_bytes("resident")))
        _in_child(words, folder, outputs, run)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    stdout, stderr = (path.read_bytes() for path in outputs)
    return Ended(words, code, stdout, stderr, usage.ru_maxrss * 1024 - int(inherited.read_text()))


def _in_child(words: tuple[str, ...], folder: Path, outputs: list[Path], run: Callable[[tuple[str, ...]], int]) -> NoReturn:
    code = _ESCAPED
    try:
        for number, path in zip((1, 2), outputs, strict=True):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # as the interpreter opens them
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        give_up_powers()
        room = _memory_bytes("mapped") + _ADDRESS_ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, TIMEOUT_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SECONDS * _WAITING)
        code = run(words)
    except BaseException:
        traceback.print_exc(limit=-12)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@functools.cache
def _command() -> Callable[..., object]:
    """All commands, put together once for all children: that takes longer than most of them."""
    from typer.main import get_command

    from orchestrator.cli.commands import app

    return get_command(app)


def _command_line(words: tuple[str, ...]) -> int:
    """Exit code of `orchestrator WORDS`; lets out what the command line lets out."""
    try:
        _command()(list(words), prog_name="orchestrator")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _memory_bytes(kind: Literal["mapped", "resident"]) -> int:
    """Memory of this process. /proc/self/statm begins with both, in pages."""
    mapped, resident = Path("/proc/self/statm").read_text().split()[:2]
    return int(mapped if kind == "mapped" else resident) * resource.getpagesize()
