"""`mpiexec -n tp python -m tests.models.run_ranks job.json ...`: several jobs of verify_rank under one launch."""

from __future__ import annotations

import sys

from orchestrator.work import verify_rank

if __name__ == "__main__":
    from mpi4py import MPI

    # onnxruntime_extensions takes an operator once in a process; verify_rank has a process per job.
    library = verify_rank._collectives(MPI.COMM_WORLD)
    verify_rank._collectives = lambda world: library
    for job in sys.argv[1:]:
        verify_rank.main(job)
