"""Execute every rank of a pipeline stage under MPI; on the last stage, compare with the reference.

Stage after stage: the hidden states of all calls travel as one file from a stage's verify step to the next one's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from orchestrator.core.errors import OrchestratorError, ToolError, VerificationError
from orchestrator.core.manifest import Verification
from orchestrator.core.options import StageNetwork, StageOptions, VerifyOptions
from orchestrator.core.step import Cause, Kind, Output, Task
from orchestrator.programs import find_program
from orchestrator.work import compare
from orchestrator.work.calls import positions_of
from orchestrator.work.context import Context
from orchestrator.work.failures import ProcessLostError
from orchestrator.work.process import die_with_parent, without_launcher
from orchestrator.work.reference import OUTPUT as REFERENCE
from orchestrator.work.shards import rank_shards

HIDDEN_STATES = "hidden_states.safetensors"
"""call{i}: float32 [B, S, hidden], what the stage hands to the next one."""
_STDERR_LINES = 20
_FAILED = re.compile(rf"rank failed:({'|'.join(filter(None, Cause))}|)")
"""What a rank says of its error. Launchers may run the lines of two ranks together."""
_CRASHED = re.compile(r"signal (4|6|7|8|11)\b")
"""How launchers tell of a rank that a bug has ended: illegal instruction, abort, bus error, arithmetic, segmentation fault."""


class RankJob(BaseModel):
    """What the MPI program is told; ranks find their own shards in it."""

    network: StageNetwork
    decode_steps: int
    shards: list[list[str]]
    """Files by tp_rank."""
    reference: str
    hidden_states: str | None
    """Of the previous stage."""
    output: str

    @property
    def stage(self) -> StageOptions:
        return self.network.stage


def verify(task: Task, context: Context) -> dict[str, Any]:
    """Run the stage. Facts: the digests of the ranks' networks; on the last stage the verification numbers.

    Raises VerificationError above tolerance.
    """
    options = VerifyOptions.model_validate(task.step.options)
    stage = options.network.stage
    networks = [options.network.digest(tp_rank) for tp_rank in range(stage.tp)]
    result = context.scratch / "result.safetensors"
    job = RankJob(
        network=options.network,
        decode_steps=options.decode_steps,
        shards=[[str(path) for path in rank_shards(task, context, stage.rank(tp_rank))] for tp_rank in range(stage.tp)],
        reference=str(context.fetch(_needed(task, Kind.REFERENCE, REFERENCE))),
        hidden_states=None if stage.is_first else str(context.fetch(_needed(task, Kind.VERIFY, HIDDEN_STATES))),
        output=str(result),
    )
    run_stage(job, context)
    if not stage.is_last:
        data = result.read_bytes()
        with context.output(HIDDEN_STATES, len(data)) as writer:
            writer.write(data)
        return {"stage": stage.pp_rank, "networks": networks}
    found = compare_with_reference(result, Path(job.reference), options.decode_steps)
    context.log(f"verification: {found.model_dump()}")
    compare.check(found, options.tolerance)
    return {"stage": stage.pp_rank, "networks": networks, "verification": found.model_dump()}


def _needed(task: Task, kind: Kind, name: str) -> Output:
    for need in task.step.needs:
        if task.inputs[need].kind is kind:
            return task.inputs[need].output(name)
    raise ToolError(f"{task.step.name} has no {kind.value} step among its needs")


def run_stage(job: RankJob, context: Context) -> None:
    """`mpiexec -n tp` over the ranks of the stage. Raises VerificationError with the end of what the ranks said."""
    launcher = find_mpiexec()
    path = context.scratch / "job.json"
    path.write_text(job.model_dump_json())
    command = [launcher, "-n", str(job.stage.tp), sys.executable, "-m", "orchestrator.work.verify_rank", str(path)]
    errors = context.scratch / "stderr"
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=rank_environment(), text=True, preexec_fn=die_with_parent
        ) as process,
    ):
        try:
            cause = _follow(process, context)
        except BaseException:
            process.kill()
            raise
    code = process.returncode
    said = "\n".join(errors.read_text(errors="replace").splitlines()[-_STDERR_LINES:])
    if said:
        context.log(said)
    if not code:
        return
    # Launchers tell of a killed rank in different words, and MPICH's in none at times.
    cause = Cause.MEMORY if cause is None else cause
    if cause is Cause.UNKNOWN:
        raise VerificationError(f"a rank of stage {job.stage.pp_rank} failed under MPI (exit code {code})")
    how = "was killed, as the kernel does when memory is short" if cause is Cause.MEMORY else f"lacked {cause.value}"
    raise VerificationError(f"a rank of stage {job.stage.pp_rank} {how}") from ProcessLostError(cause)


def _follow(process: subprocess.Popen[str], context: Context) -> Cause | None:
    """Pass on the calls that rank 0 counts; why a rank failed. None: neither a rank nor the launcher told of an error."""
    assert process.stdout is not None
    told: list[Cause] = []
    for line in process.stdout:
        match line.split():
            case ["call", done, total]:
                context.report("verify", int(done), int(total), "steps")
            case _:
                told += [Cause(why) for why in _FAILED.findall(line)]
                told += [Cause.UNKNOWN] * bool(_CRASHED.search(line))
    # One rank's full disk is the other ranks' broken communicator.
    return next(filter(None, told), told[0] if told else None)


def find_mpiexec() -> str:
    """The launcher beside this Python, or on the PATH. Raises ToolError."""
    found = find_program("mpiexec")
    if found is None:
        raise ToolError("there is no mpiexec on this machine", "Install it: pip install mpich.")
    return found


def rank_environment() -> dict[str, str]:
    """This process's environment without another launcher's variables, one thread per rank."""
    return {**without_launcher(os.environ), "OMP_NUM_THREADS": "1"}


def compare_with_reference(result: Path, reference: Path, decode_steps: int) -> Verification:
    """Line up the logits of all calls with the reference's positions and compare them."""
    from safetensors.numpy import load_file

    ours: Mapping[str, npt.NDArray[np.float32]] = load_file(result)
    theirs = load_file(reference)
    try:
        places = list(positions_of(theirs["lengths"], decode_steps))
        logits = np.stack([ours[f"call{call}"][sequence, row] for sequence, _, call, row in places])
        expected = np.stack([theirs["logits"][sequence, position] for sequence, position, _, _ in places])
    except (KeyError, IndexError) as error:
        raise OrchestratorError(f"the ranks returned fewer logits than were asked for: {error}") from error
    last = theirs["lengths"] - 1
    following = [
        theirs["tokens"][sequence, position + 1] if position < last[sequence] else -1 for sequence, position, _, _ in places
    ]
    found = compare.compare(logits, expected, np.array(following))
    to_source = found.max_relative_error
    if "source_logits" in theirs:
        own = np.stack([theirs["source_logits"][sequence, position] for sequence, position, _, _ in places])
        to_source = compare.compare(logits, own).max_relative_error
    return found.model_copy(update={"max_relative_error_to_source": to_source})
