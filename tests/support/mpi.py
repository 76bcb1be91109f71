"""MPI for tests of what runs under it: the launcher, and an environment in which it may be started."""

from __future__ import annotations

import os

from orchestrator.base.programs import find_program
from orchestrator.work.process import without_launcher


def find_mpiexec() -> str:
    """The launcher that mpi4py's MPI came with."""
    found = find_program("mpiexec")
    assert found is not None, "pip install mpich"
    return found


def rank_environment() -> dict[str, str]:
    """This process's environment without another launcher's variables, one thread per rank."""
    return {**without_launcher(os.environ), "OMP_NUM_THREADS": "1"}
