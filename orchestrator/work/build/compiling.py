"""Compile ranks in a separate process, for `build-engine`: TensorRT there can be killed at any time.

Files are written in a folder of the output that is locked like a scratch folder, and get their names when they are complete.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from orchestrator.base.errors import EngineBuildError, store_error
from orchestrator.events import StepFailed, StepProgressed
from orchestrator.planning.options import BuildOptions
from orchestrator.planning.steps import Failure
from orchestrator.work.child import Child, event_pipe
from orchestrator.work.failures import failure_of
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
    failed = None
    with Child("orchestrator.work.build.compiling") as child:
        for event in child.events(job):
            if isinstance(event, StepProgressed):
                progress(int(event.digest), event.phase, event.done, event.total)
            elif isinstance(event, StepFailed):
                failed = int(event.digest), event.failure
        done = [rank for rank in job.ranks if (Path(job.folder) / f"rank{rank}.engine").exists()]
        missing = [rank for rank in job.ranks if rank not in done]
        if missing and failed is None:
            failed = missing[0], child.failure("")
    return done, failed


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
    with event_pipe() as pipe:
        main(pipe)
