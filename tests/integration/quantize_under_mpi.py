"""The MPI program of test_quantize_in_process.py: every rank quantizes its part of a model and saves it.

mpiexec -n 4 python -m tests.integration.quantize_under_mpi source output
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpi4py import MPI

from orchestrator.base.errors import OrchestratorError, ToolError
from orchestrator.compat import calibrating
from orchestrator.compat.models import LLaMAForCausalLM, Mapping, QuantizationSpec
from orchestrator.quantizers import modelopt

CALIBRATION = {"num_samples": 2, "max_length": 8, "batch_size": 2}
SPEC = QuantizationSpec.model_validate({"algorithm": "FP8", "kv_cache": "INT8", "calibration": CALIBRATION})


def main(source: str, output: str) -> None:
    rank, folder = MPI.COMM_WORLD.rank, Path(output)
    calibrate = modelopt.calibrate

    def recorded(*args: Any) -> Any:
        (folder / f"modelopt-of-rank{rank}").touch(exist_ok=False)
        return calibrate(*args)

    modelopt.calibrate = recorded
    copy = shutil.copytree(source, folder / f"source{rank}", copy_function=shutil.copyfile)  # each node's own, of another time
    model = LLaMAForCausalLM.from_hugging_face(copy, dtype="bfloat16", mapping=Mapping(tp_size=2, pp_size=2, rank=rank))
    others = SPEC.model_copy(update={"kv_cache": None, "algorithm": "W4A8_AWQ", "group_size": 16})
    with refused(folder / f"different{rank}"):
        model.quantize(SPEC if rank else others)
    with refused(folder / f"unknown{rank}"):
        model.quantize(SPEC.model_copy(update={"algorithm": "NONE"}) if rank == 2 else SPEC)
    with refused(folder / f"failing{rank}"), rank_zero_fails():
        model.quantize(SPEC)
    model.quantize(SPEC)
    model.save_checkpoint(folder, save_config=rank == 0)


@contextlib.contextmanager
def refused(said: Path) -> Iterator[None]:
    """Write down the error that is raised inside."""
    try:
        yield
    except OrchestratorError as error:
        said.write_text(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def rank_zero_fails() -> Iterator[None]:
    artifact = calibrating._artifact

    def fail(_steps: Any) -> bytes:
        raise ToolError("nothing works here")

    calibrating._artifact = fail
    try:
        yield
    finally:
        calibrating._artifact = artifact


if __name__ == "__main__":
    main(*sys.argv[1:])
