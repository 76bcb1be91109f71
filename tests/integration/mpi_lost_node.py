"""Rank 0 of an MPI job whose node falls silent while it runs a step. Argument: a store's URL.

Prints the error and ends with its exit code; test_mpi_cluster.py starts it under mpiexec.
"""

from __future__ import annotations

import os
import signal
import sys

from orchestrator.base.errors import ClusterError
from orchestrator.clusters.mpi import MpiCluster
from orchestrator.planning.steps import Kind, Step, Task
from orchestrator.spec.cluster import ClusterSpec


def main() -> None:
    """Start a step, stop its node (as a host that hangs or is cut off), and wait for what the cluster says."""
    cluster = MpiCluster(ClusterSpec(kind="mpi", store=sys.argv[1]), lost_seconds=3.0)
    step = Step(kind=Kind.CONVERT, version=1, name="convert", options={})
    try:
        cluster.start(Task(step=step, inputs={}, attempt=1, store=sys.argv[1]))
        assert cluster.events(30.0)[0].event == "started"
        os.kill(cluster.pids[cluster.rank_of(step.digest)], signal.SIGSTOP)
        while True:
            cluster.events(None)
    except ClusterError as error:
        print(f"{error.message} | {error.advice}", flush=True)
        sys.exit(error.exit_code)
    finally:
        cluster.close()


main()
