"""The MPI program's start, which every rank of every verification pays for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.core.errors import ToolError, VerificationError
from orchestrator.core.options import StageNetwork, StageOptions
from orchestrator.core.step import Cause
from orchestrator.core.topology import Topology
from orchestrator.stores import open_store
from orchestrator.work import verify
from orchestrator.work.context import Context
from orchestrator.work.failures import cause_of
from tests.models.synthetic import model_config

START = """
import sys
from orchestrator.work import verify_rank
assert verify_rank._collectives(None)
print(*sorted({"torch", "transformers"} & set(sys.modules)))
import transformers
"""


def test_rank_with_collectives_starts_without_torch_and_transformers() -> None:
    """They cost seconds; who wants them afterwards still gets them."""
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-2000:]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(open_store("memory://"), "", tmp_path, lambda *progress: None, print)


@pytest.fixture
def job() -> verify.RankJob:
    """Of two ranks, with a reference that is not there."""
    stage = StageOptions.of(model_config(), Topology(2, 1), 0)
    network = StageNetwork(stage=stage, max_seq_len=16, gather_logits=False)
    return verify.RankJob(network=network, decode_steps=1, shards=[[], []], reference="missing", hidden_states=None, output="")


KILLED = "os.kill(os.getpid(), 9)"
FULL = "print('rank failed:disk', flush=True); sys.exit(1)"
LOST = "print('rank failed:rank failed:disk', flush=True); sys.exit(1)"


@pytest.mark.parametrize(
    ("ends", "cause", "told"),
    [
        (KILLED, Cause.MEMORY, "a rank of stage 0 was killed, as the kernel does when memory is short"),
        (FULL, Cause.DISK, "a rank of stage 0 lacked disk"),
        (LOST, Cause.DISK, "a rank of stage 0 lacked disk"),
    ],
)
def test_stage_whose_rank_ends_is_tried_again_unless_it_is_its_own_fault(
    ends: str, cause: Cause, told: str, job: verify.RankJob, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "rank.py"
    program.write_text(f"import os, sys\n{ends}\n")
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\nexec {verify.find_mpiexec()} -n 2 {sys.executable} {program}\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(verify, "find_mpiexec", lambda: str(launcher))
    with pytest.raises(VerificationError, match=told) as caught:
        verify.run_stage(job, context)
    assert cause_of(caught.value) is cause


def test_stage_whose_rank_fails_is_wrong_and_not_tried_again(job: verify.RankJob, context: Context) -> None:
    with pytest.raises(VerificationError, match="a rank of stage 0 failed under MPI") as caught:
        verify.run_stage(job, context)
    assert cause_of(caught.value) is Cause.UNKNOWN


def launcher(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake mpiexec."""
    path = folder / "mpiexec"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(verify, "find_mpiexec", lambda: str(path))


REFUSES_ROOT = """cat >&2 <<'WORDS'
--------------------------------------------------------------------------
mpiexec has detected an attempt to run as root.

Running as root is *strongly* discouraged as any mistake (e.g., in
defining TMPDIR) or bug can result in catastrophic damage to the OS
file system, leaving your system in an unusable state.

We strongly suggest that you run mpiexec as a non-root user.

You can override this protection by adding the --allow-run-as-root option
to the cmd line or by setting two environment variables in the following way:
the variable OMPI_ALLOW_RUN_AS_ROOT=1 to indicate the desire to override this
protection, and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 to confirm the choice and
add one more layer of certainty that you want to do so.
--------------------------------------------------------------------------
WORDS
exit 1"""
STRANGERS = 'shift 2\n"$@" & "$@"\ncode=$?\nwait\nexit $code'
"""Starts two ranks that know nothing of each other."""
NO_LIBRARY = "echo 'ImportError: libmpi.so.12: cannot open shared object file' >&2\nexit 1"
SILENT_AT_ONCE = "exit 255"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param(REFUSES_ROOT, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", id="refuses-root"),
        pytest.param(STRANGERS, "a rank sees 1 of 2 ranks: mpiexec is not of mpi4py's MPICH", id="strangers"),
        pytest.param(NO_LIBRARY, "libmpi.so.12", id="no-library"),
        pytest.param(SILENT_AT_ONCE, "ended with exit code 255, and said nothing", id="silent-at-once"),
    ],
)
def test_launcher_that_does_not_work_is_an_error_of_the_tools_with_its_words_and_not_tried_again(
    text: str, told: str, job: verify.RankJob, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher(text, tmp_path, monkeypatch)
    with pytest.raises(ToolError) as caught:
        verify.run_stage(job, context)
    assert told in caught.value.message
    assert "mpich" in caught.value.advice
    assert cause_of(caught.value) is Cause.UNKNOWN


def test_setting_that_lets_open_mpi_start_for_root_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    environment = verify.rank_environment()
    assert environment["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    assert "OMPI_COMM_WORLD_RANK" not in environment


OPEN_MPI_KILLED = "echo 'mpiexec noticed that process rank 1 with PID 7 on node n exited on signal 9 (Killed).' >&2\nexit 1"


@pytest.mark.parametrize(
    ("text", "kills", "cause"),
    [
        pytest.param("echo 'rank started'\nexit 255", 0, Cause.WORKER, id="silent-after-the-start"),
        pytest.param("echo 'rank started'\nexit 255", 1, Cause.MEMORY, id="silent-and-the-kernel-killed"),
        pytest.param("exit 255", 1, Cause.MEMORY, id="silent-at-once-and-the-kernel-killed"),
        pytest.param(OPEN_MPI_KILLED, 0, Cause.MEMORY, id="open-mpi-says-killed"),
        pytest.param("kill -9 $$", 0, Cause.MEMORY, id="launcher-killed"),
    ],
)
def test_stage_whose_ranks_are_lost_is_tried_again_for_what_the_evidence_says(
    text: str, kills: int, cause: Cause, job: verify.RankJob, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher(text, tmp_path, monkeypatch)
    counts = iter([5, 5 + kills])
    monkeypatch.setattr(verify, "oom_kills", lambda: next(counts))
    with pytest.raises(VerificationError, match="a rank of stage 0") as caught:
        verify.run_stage(job, context)
    assert cause_of(caught.value) is cause
    assert "check dtype, family and source" not in caught.value.advice
