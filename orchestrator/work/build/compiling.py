"""Compile ranks in a separate process, for `build-engine`: TensorRT there can be killed at any time.

The job goes in on stdin, events come out on stdout as JSON lines. Files are written in a folder of the output that is locked like a
scratch folder, and get their names when they are complete.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from orchestrator.base.errors import EngineBuildError, store_error
from orchestrator.planning.options import BuildOptions
from orchestrator.events import STEP_EVENT, StepFailed, StepProgressed
from orchestrator.planning.steps import Failure
from orchestrator.work.failures import failure_of
from orchestrator.work.lost import crash, oom_kills
from orchestrator.work.process import belong_to_parent
from orchestrator.work.scratch import remove_dead, scratch_folder


class CompileJob(BaseModel):
    """Input of the compiling process."""

    checkpoint: str
    """TensorRT-LLM checkpoint folder."""
    ranks: dict[int, BuildOptions]
    folder: str
    """Folder where each rank{N}.engine is written."""
    log: str
    """File for TensorRT's messages about the rank that fails."""


def compile_apart(
    checkpoint: Path, ranks: dict[int, BuildOptions], output: Path, progress: Callable[[int, str, int, int], None]
) -> None:
    """Write rank{N}.engine of every rank to the folder `output`. `progress` gets rank, phase, done, total.

    Raises the error of the rank that fails; its log is kept as rank{N}.log.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise store_error(f"cannot write to {output}", problem) from None
    remove_dead(output)
    with scratch_folder(output) as folder:
        log = folder / "log"
        job = CompileJob(checkpoint=str(checkpoint), ranks=ranks, folder=str(folder), log=str(log))
        done, failed = _run(job, progress)
        for rank in done:
            (folder / f"rank{rank}.engine").replace(output / f"rank{rank}.engine")
        if failed is not None:
            rank, failure = failed
            error, kept = failure.to_error(f"rank {rank}"), output / f"rank{rank}.log"
            if log.exists():
                log.replace(kept)
            if isinstance(error, EngineBuildError):
                error.advice = f"TensorRT's own messages are in {kept}."
            raise error


def _run(job: CompileJob, progress: Callable[[int, str, int, int], None]) -> tuple[list[int], tuple[int, Failure] | None]:
    """Run the job; returns the ranks with a complete engine, and the failed rank with its failure."""
    words, kills = [sys.executable, "-m", "orchestrator.work.build.compiling"], oom_kills()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, preexec_fn=belong_to_parent
        ) as process,
    ):
        try:
            failed = _follow(process, job, progress)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        done = [rank for rank in job.ranks if (Path(job.folder) / f"rank{rank}.engine").exists()]
        if code and failed is None:
            rank = next((rank for rank in job.ranks if rank not in done), 0)
            failed = rank, crash(code, "", errors, oom_kills() - kills)
    return done, failed


def _follow(
    process: subprocess.Popen[bytes], job: CompileJob, progress: Callable[[int, str, int, int], None]
) -> tuple[int, Failure] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    failed = None
    try:
        with process.stdin:
            process.stdin.write(job.model_dump_json().encode())
    except BrokenPipeError:  # the process ended at once: its exit code says more
        return None
    for line in process.stdout:
        event = STEP_EVENT.validate_json(line)
        if isinstance(event, StepProgressed):
            progress(int(event.digest), event.phase, event.done, event.total)
        elif isinstance(event, StepFailed):
            failed = int(event.digest), event.failure
    return failed


def main(pipe: IO[str]) -> None:
    """Compile the job of stdin."""
    from orchestrator.stores.file import FileStore
    from orchestrator.work.build.step import compile_rank
    from orchestrator.work.shards import map_checkpoint_rank

    job = CompileJob.model_validate_json(sys.stdin.read())
    store = FileStore(Path(job.folder).as_uri())

    for rank, options in job.ranks.items():
        log: list[str] = []

        def report(phase: str, done: int, total: int, digest: str = str(rank)) -> None:
            progress = StepProgressed(digest=digest, phase=phase, done=done, total=total, unit="steps")
            pipe.write(progress.model_dump_json() + "\n")

        try:
            weights = map_checkpoint_rank(Path(job.checkpoint), rank)
            with store.writer(f"rank{rank}.engine") as writer:
                compile_rank(options, weights, writer.write, report, log.append)
        except Exception as error:
            Path(job.log).write_text("\n".join(log) + "\n")
            failed = StepFailed(digest=str(rank), failure=failure_of(error, "", "", ""))
            pipe.write(failed.model_dump_json() + "\n")
            return


if __name__ == "__main__":
    # Native code may print to stdout: only events go into the pipe.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        main(pipe)
