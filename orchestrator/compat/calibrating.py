"""Calibration in this process, for the in-process API: the steps of a plan one after another, once per MPI program.

Model Optimizer runs on rank 0 of COMM_WORLD. The other ranks wait, without spinning, and receive the artifact.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from orchestrator import work
from orchestrator.base.digest import digest_of
from orchestrator.base.errors import SpecError
from orchestrator.model.topology import Topology
from orchestrator.planning.plan import Inputs, calibrate_steps
from orchestrator.planning.steps import Failure, Outcome, Step, Task
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.work.launcher import LAUNCHED, check_launcher
from orchestrator.work.process import scratch_root
from orchestrator.work.scales import SCALES, Scales
from orchestrator.work.scratch import scratch_folder

_POLL_SECONDS = 0.05
_T = TypeVar("_T")


def prepared(prepare: Callable[[], Inputs], topology: Topology) -> tuple[Inputs, list[Step]]:
    """Return the inputs that `prepare` makes, and their calibration steps, on every rank of an MPI program.

    Raises the error of `prepare` on all ranks when one rank fails, and SpecError when the ranks' calibrations differ.
    """

    def both() -> tuple[Inputs, list[Step]]:
        inputs = prepare()
        return inputs, calibrate_steps(inputs, topology)

    inputs, steps = _everywhere(both)
    comm = _world()
    if comm is not None and len(set(comm.allgather(_asked(inputs, steps)))) > 1:
        raise SpecError("the ranks of this MPI program ask for different quantizations", "Call quantize() with the same arguments.")
    return inputs, steps


def _asked(inputs: Inputs, steps: Sequence[Step]) -> str:
    """Return a digest that must be equal on all ranks. It leaves out file identities, because each node may have its own copy."""
    files = [(file.name, file.num_bytes) for file in inputs.index.files]
    options = [{name: value for name, value in step.options.items() if name != "files"} for step in steps]
    model, quantization = inputs.model_quantization, inputs.quantization
    stored = [model.model_dump(mode="json") if model else None, quantization.scales_sha256 if quantization else None]
    return digest_of([inputs.config.model_dump(mode="json"), stored, options, files])


def scales_for_all(inputs: Inputs, steps: Sequence[Step]) -> Scales | None:
    """Return the user's artifact, or that of the calibrations `steps`; None: the algorithm needs none.

    Raises as a calibrate step does. An error on rank 0 is raised on every rank.
    """
    from safetensors.numpy import load

    given = inputs.quantization.scales if inputs.quantization else None
    if given is not None:
        return Scales.read([Path(given) / SCALES])
    if not steps:
        return None
    return Scales(load(_on_first(lambda: _artifact(steps))))


def _artifact(steps: Sequence[Step]) -> bytes:
    from safetensors.numpy import load, save

    values = {}
    with scratch_folder(scratch_root(None)) as folder:
        store = open_store(folder.as_uri())
        outcomes: dict[str, Outcome] = {}
        for step in steps:
            outcomes[step.digest] = _run(step, outcomes, store, str(folder))
            values.update(load(store.get(outcomes[step.digest].output(SCALES).key)))
    return save(values)


def _run(step: Step, outcomes: dict[str, Outcome], store: Store, scratch: str) -> Outcome:
    inputs = {need: outcomes[need] for need in step.needs}
    return work.run(Task(step=step, inputs=inputs, attempt=1, store=store.url, scratch=scratch), lambda progress: None)


def _world() -> Any:
    """Return COMM_WORLD of an MPI program with several ranks; None: no such program, and MPI is not initialized."""
    if "mpi4py.MPI" not in sys.modules and not any(name in os.environ for name in LAUNCHED):
        return None
    from mpi4py import MPI

    check_launcher(os.environ, MPI.Get_library_version(), MPI.COMM_WORLD.size)
    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


def _everywhere(compute: Callable[[], _T]) -> _T:
    """Return the result of `compute` on each rank. If it fails on one rank, all ranks raise instead of waiting."""
    comm = _world()
    if comm is None:
        return compute()
    try:
        value, error = compute(), None
    except Exception as raised:
        value, error = None, raised
    failures = comm.allgather(None if error is None else Failure.of(error))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise failure.to_error(f"rank {rank}")
    assert value is not None
    return value


def _on_first(compute: Callable[[], bytes]) -> bytes:
    """Run `compute` on rank 0 and return its result on every rank."""
    comm = _world()
    if comm is None:
        return compute()
    data, error = b"", None
    try:
        if comm.rank == 0:
            data = compute()
    except Exception as raised:
        error = raised
    finished = comm.Ibarrier()
    while not finished.Test():
        time.sleep(_POLL_SECONDS)
    failure = comm.bcast(None if error is None else Failure.of(error))
    if error is not None:
        raise error
    if failure is not None:
        raise failure.to_error("rank 0")
    received: bytes = comm.bcast(data)
    return received
