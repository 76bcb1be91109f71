"""An MPI launcher and a library that do not belong together are named, before anything is computed."""

from __future__ import annotations

import pytest

from orchestrator.base.errors import ToolError
from orchestrator.work.launcher import check_launcher

MPICH, OPEN = "MPICH Version:      4.3.2\nMPICH Release date: ...", "Open MPI v5.0.11, package: Open MPI"


@pytest.mark.parametrize(
    ("environment", "library", "size"),
    [
        ({}, MPICH, 1),
        ({"PMI_SIZE": "4"}, MPICH, 4),
        ({"PMI_SIZE": "1"}, MPICH, 1),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, OPEN, 2),
        ({"PMI_SIZE": "?"}, MPICH, 1),
    ],
)
def test_check_launcher_of_one_mpi_passes(environment: dict[str, str], library: str, size: int) -> None:
    check_launcher(environment, library, size)


@pytest.mark.parametrize(
    ("environment", "library", "words"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, MPICH, r"Open MPI started 4 processes, but mpi4py loaded MPICH Version:      4\.3\.2, in"),
        ({"PMI_SIZE": "3"}, OPEN, r"MPICH started 3 processes, but mpi4py loaded Open MPI v5\.0\.11"),
    ],
)
def test_check_launcher_of_another_mpi_names_both(environment: dict[str, str], library: str, words: str) -> None:
    with pytest.raises(ToolError, match=words) as caught:
        check_launcher(environment, library, 1)
    assert "mpiexec of the library" in caught.value.advice
