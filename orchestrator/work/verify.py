"""Execute every rank of a pipeline stage under MPI; on the last stage, compare with the reference.

Stage after stage: the hidden states of all calls travel as one file from a stage's verify step to the next one's.
"""

from __future__ import annotations

import os
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
from orchestrator.work.lost import Loss, Ranks, diagnose, oom_kills
from orchestrator.work.process import die_with_parent, without_launcher
from orchestrator.work.reference import OUTPUT as REFERENCE
from orchestrator.work.shards import rank_shards

HIDDEN_STATES = "hidden_states.safetensors"
"""call{i}: float32 [B, S, hidden], what the stage hands to the next one."""
_STDERR_LINES = 20
_MESSAGE_CHARACTERS = 1000
_ADVICE = (
    "mpi4py and mpiexec must be of one MPI: `pip install mpich` beside mpi4py. Open MPI's mpiexec starts nothing for root unless "
    "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 are set."
)
_RANK_ADVICE = "The rank's own words stand in the step's log. Nothing was published."
_LOST_ADVICE = "Give the step more room (memory, scratch) or more tp, and run the same command again. Nothing was published."


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
    """`mpiexec -n tp` over the ranks of the stage. Raises VerificationError, ToolError with the words of a launcher that fails."""
    launcher, kills = find_mpiexec(), oom_kills()
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
            ranks = _follow(process, context)
        except BaseException:
            process.kill()
            raise
    said = "\n".join(errors.read_text(errors="replace").splitlines()[-_STDERR_LINES:])
    if said:
        context.log(said)
    if process.returncode:
        for line in said.splitlines():  # Open MPI tells there of killed ranks
            ranks.hear(line)
        where = f"a rank of stage {job.stage.pp_rank}"
        raise _error(diagnose(ranks, process.returncode, num_oom_kills=oom_kills() - kills), where, process.returncode, said)


def _error(loss: Loss, where: str, code: int, said: str) -> OrchestratorError:
    """The error of a stage whose launcher ended with exit code `code`, raised from what lies under it."""
    last = f": {said[-_MESSAGE_CHARACTERS:]}" if said else ", and said nothing"
    if loss.of_tools:
        return ToolError(f"{where} {loss.how}: {find_mpiexec()} ended with exit code {code}{last}", _ADVICE)
    if loss.cause is Cause.UNKNOWN:
        return VerificationError(f"{where} failed under MPI (exit code {code}){last}", _RANK_ADVICE)
    error = VerificationError(f"{where} {loss.how} (exit code {code})", _LOST_ADVICE)
    error.__cause__ = ProcessLostError(loss.cause)
    return error


def _follow(process: subprocess.Popen[str], context: Context) -> Ranks:
    """Pass on the calls that rank 0 counts, and hear what ranks and launcher say of failures."""
    assert process.stdout is not None
    ranks = Ranks()
    for line in process.stdout:
        match line.split():
            case ["call", done, total]:
                context.report("verify", int(done), int(total), "steps")
            case _:
                ranks.hear(line)
    return ranks


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
