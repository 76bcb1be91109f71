"""Commands that are asked to end: in time, with a code of their own, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.compat.models import LLaMAForCausalLM
from orchestrator.work.process import end_descendants
from orchestrator.work.scratch import remove_dead
from tests.support.signals import hear_interrupts

SIGNALS = [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
COMMAND = """
import signal, subprocess, sys, time
import typer
from orchestrator.cli.__main__ import run
from orchestrator.cli.console import exit_codes

app = typer.Typer()

def wait(word="ready"):
    print(word, flush=True)
    time.sleep(60)

@app.command()
def command():
    with exit_codes():
        BODY

run(lambda: app)
"""
"""A command: what it does stands for BODY."""


def words_of(body: str) -> list[str]:
    return [sys.executable, "-c", COMMAND.replace("BODY", body.replace("\n", "\n        "))]


def command(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(words_of(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts)


def has_ended(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def stop(process: subprocess.Popen[str], number: int, *, ready: str = "ready") -> tuple[int, float, str]:
    """Send the signal when the process is ready. Exit code, seconds to the end, and what it said."""
    assert process.stdout is not None
    try:
        while ready not in (line := process.stdout.readline()):
            assert line, process.communicate()
        began = time.monotonic()
        process.send_signal(number)
        said = "".join(process.communicate(timeout=30))
    finally:
        process.kill()
    return process.returncode, time.monotonic() - began, said


@pytest.mark.parametrize(("number", "code", "words"), SIGNALS)
def test_command_asked_to_end_cleans_up_and_ends_with_the_signals_code(number: int, code: int, words: str) -> None:
    body = "try:\n    wait()\nfinally:\n    print('cleaned up', flush=True)"
    found, seconds, said = stop(command(body), number)
    assert (found, f"error: {words}" in said, "cleaned up" in said) == (code, True, True)
    assert seconds < 2


@pytest.mark.parametrize(("number", "code", "words"), SIGNALS)
def test_command_whose_library_took_the_signals_ends_with_the_signals_code(number: int, code: int, words: str) -> None:
    """Ray does so for SIGTERM when it starts: sys.exit(15)."""
    body = f"signal.signal({int(number)}, lambda number, frame: sys.exit(number))\nwait()"
    found, _, said = stop(command(body), number)
    assert (found, f"error: {words}" in said) == (code, True)


@pytest.mark.parametrize(("number", "code", "words"), SIGNALS)
def test_command_whose_library_wants_the_signals_while_they_are_kept_cleans_up(number: int, code: int, words: str) -> None:
    """Ray's handler kills its processes, and Ray aborts ours when they are gone."""
    body = (
        "from orchestrator.cli.stopping import kept\n"
        "before = signal.signal\n"
        f"with kept():\n    signal.signal({int(number)}, lambda number, frame: os.abort())\n"
        "assert signal.signal is before\n"
        "try:\n    wait()\nfinally:\n    print('cleaned up', flush=True)"
    )
    found, _, said = stop(command(body), number)
    assert (found, f"error: {words}" in said, "cleaned up" in said) == (code, True, True)


@pytest.mark.parametrize(("number", "code", "words"), SIGNALS)
def test_command_that_loses_the_interrupt_is_ended_with_all_that_it_started(number: int, code: int, words: str) -> None:
    """As native code does that calls back into Python."""
    body = (
        "child = subprocess.Popen(['sh', '-c', 'sleep 60 & echo $!; wait'], stdout=subprocess.PIPE, text=True)\n"
        "print('children', child.pid, child.stdout.readline().strip(), flush=True)\n"
        "while True:\n    try:\n        wait()\n    except BaseException:\n        pass"
    )
    process = command(body)
    assert process.stdout is not None
    children = [int(word) for word in process.stdout.readline().split()[1:]]
    found, seconds, said = stop(process, number)
    assert (found, f"error: {words}" in said) == (code, True)
    assert seconds < 5
    assert all(map(has_ended, children))


def test_command_that_finishes_although_the_interrupt_was_lost_does_not_end_with_success() -> None:
    found, _, _ = stop(command("try:\n    wait()\nexcept BaseException:\n    pass"), signal.SIGTERM)
    assert found == 143


def test_command_asked_twice_cleans_up_all_the_same() -> None:
    body = "try:\n    wait()\nfinally:\n    wait_twice = signal.raise_signal(signal.SIGINT)\n    print('cleaned up', flush=True)"
    found, _, said = stop(command(body), signal.SIGTERM)
    assert (found, "cleaned up" in said) == (143, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_that_has_ended_is_not_killed_while_the_interpreter_ends(number: int) -> None:
    """An object of a module dies after the signals have lost their handlers."""
    body = """import sys, types
class Last:
    def __del__(self, os=__import__("os"), time=__import__("time")):
        os.write(1, b"ready\\n")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
sys.modules["last"] = types.ModuleType("last")
sys.modules["last"].last = Last()"""
    code, _, _ = stop(command(body), number)
    assert code == 0


def test_command_under_nohup_ignores_the_signal() -> None:
    body = "print('ready', flush=True)\nsignal.raise_signal(signal.SIGINT)\nprint('went on', flush=True)"

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    done = subprocess.run(words_of(body), capture_output=True, text=True, preexec_fn=ignore)
    assert (done.returncode, done.stdout.split("\n")[1]) == (0, "went on"), done.stderr


OWNER = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_SH); print(1, flush=True); time.sleep(60)"


def test_descendants_of_a_name_are_ended_and_have_let_go_of_their_locks(tmp_path: Path) -> None:
    name = f"owner-{os.getpid()}"  # what else this test run has started is left alone
    folder = tmp_path / "trt-orchestrator--0123456789ab"
    folder.mkdir()
    words = [name, "-c", OWNER, str(folder)]
    with (
        subprocess.Popen(words, executable=sys.executable, stdout=subprocess.PIPE) as process,
        subprocess.Popen(["sleep", "60"]) as other,
    ):
        assert process.stdout is not None
        assert process.stdout.readline()
        assert remove_dead(tmp_path) == []
        end_descendants(name, 10.0)
        assert remove_dead(tmp_path) == [folder]
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize(("number", "code", "words"), SIGNALS)
def test_build_engine_stopped_while_tensorrt_compiles_leaves_nothing(
    number: int, code: int, words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "engines"
    LLaMAForCausalLM.from_hugging_face(tiny_llama).save_checkpoint(checkpoint)
    options = ["--checkpoint", str(checkpoint), "--output", str(output), "--max-batch-size", "2", "--max-seq-len", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "build-engine", *options, "--max-input-len", "16"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts,
    )  # fmt: skip
    while not list(output.glob("*/.tmp-*")):  # the engine's file is begun: TensorRT is at work
        assert process.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(number)
    said = "".join(process.communicate(timeout=30))
    assert (process.returncode, f"error: {words}" in said) == (code, True), said
    assert time.monotonic() - began < 5
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(("number", "code", "words"), SIGNALS)
def test_command_ends_although_a_library_does_not_when_the_interpreter_ends(number: int, code: int, words: str) -> None:
    """Ray's end takes seconds, and crashes where its start was interrupted."""
    body = "import atexit, os\natexit.register(lambda: (time.sleep(30), os.abort()))\nwait()"
    found, seconds, said = stop(command(body), number)
    assert (found, f"error: {words}" in said) == (code, True)
    assert seconds < 2
