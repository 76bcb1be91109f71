"""Calibration within this process, for the in-process API: the steps of a plan one after another, once in an MPI program.

Model Optimizer runs on rank 0 of COMM_WORLD; the other ranks wait, without spinning, and receive the artifact.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from orchestrator import work
from orchestrator.core.digest import digest_of
from orchestrator.core.errors import QuantizationError, SpecError
from orchestrator.core.plan import Inputs, calibrate_steps
from orchestrator.core.step import Outcome, Step, Task
from orchestrator.core.topology import Topology
from orchestrator.stores import Store, open_store
from orchestrator.work.scales import SCALES, Scales

_LAUNCHED = ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE")
"""What mpiexec sets for the processes that it starts."""
_POLL_SECONDS = 0.05
_T = TypeVar("_T")


def prepared(prepare: Callable[[], Inputs], topology: Topology) -> tuple[Inputs, list[Step]]:
    """What `prepare` returns, and the calibrations that it asks for, on every rank of an MPI program.

    Raises what `prepare` raises, on every rank when one fails; SpecError when the ranks ask for different calibrations.
    """

    def both() -> tuple[Inputs, list[Step]]:
        inputs = prepare()
        return inputs, calibrate_steps(inputs, topology)

    inputs, steps = _everywhere(both)
    quantization = inputs.quantization
    asked = [*(step.digest for step in steps), quantization.scales_sha256 if quantization else None]
    comm = _world()
    if comm is not None and len(set(comm.allgather(digest_of(asked)))) > 1:
        raise SpecError("the ranks of this MPI program ask for different quantizations", "Call quantize() with the same arguments.")
    return inputs, steps


def scales_for_all(inputs: Inputs, steps: Sequence[Step]) -> Scales | None:
    """The artifact that the user brings, or that of the calibrations `steps`; None: the algorithm needs none.

    An error of rank 0 is raised on every rank. Raises as a calibrate step does.
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
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        store = open_store(Path(folder).as_uri())
        outcomes: dict[str, Outcome] = {}
        for step in steps:
            outcomes[step.digest] = _run(step, outcomes, store, folder)
            values.update(load(store.get(outcomes[step.digest].output(SCALES).key)))
    return save(values)


def _run(step: Step, outcomes: dict[str, Outcome], store: Store, scratch: str) -> Outcome:
    inputs = {need: outcomes[need] for need in step.needs}
    return work.run(Task(step=step, inputs=inputs, attempt=1, store=store.url, scratch=scratch), lambda progress: None)


def _world() -> Any:
    """COMM_WORLD of an MPI program of several ranks; None elsewhere, where MPI is not even initialized."""
    if "mpi4py.MPI" not in sys.modules and not any(name in os.environ for name in _LAUNCHED):
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD if MPI.COMM_WORLD.size > 1 else None


def _everywhere(compute: Callable[[], _T]) -> _T:
    """What `compute` returns on each rank; when it fails on one, all ranks raise, instead of waiting for it for ever."""
    comm = _world()
    if comm is None:
        return compute()
    try:
        value, error = compute(), None
    except Exception as raised:
        value, error = None, raised
    failed = {rank: said for rank, said in enumerate(comm.allgather(None if error is None else str(error))) if said is not None}
    if error is not None:
        raise error
    if failed:
        rank, said = next(iter(failed.items()))
        raise QuantizationError(f"rank {rank} failed: {said}")
    assert value is not None
    return value


def _on_first(compute: Callable[[], bytes]) -> bytes:
    """What `compute` returns on rank 0, on every rank."""
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
    said = comm.bcast(None if error is None else str(error))
    if error is not None:
        raise error
    if said is not None:
        raise QuantizationError(f"rank 0 failed: {said}")
    received: bytes = comm.bcast(data)
    return received
