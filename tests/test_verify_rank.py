"""The MPI program's start, which every rank of every verification pays for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.core.errors import VerificationError
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
