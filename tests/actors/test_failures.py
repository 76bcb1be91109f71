"""What Ray's exceptions mean, and what a dead worker leaves behind."""

from __future__ import annotations

import errno

import pytest
from ray import exceptions

from actors.failures import failure_of
from actors.placement import Node
from actors.postmortem import facts_here, kernel_lines
from orchestrator.core.errors import DtypeError
from orchestrator.core.step import Cause, FailureKind, Resources

NODE = Node("id", "host/id", Resources())


def raised(error: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("run", "a traceback", error)


def died(words: str) -> exceptions.ActorDiedError:
    """As Ray says it, with words of the cause."""
    return exceptions.ActorDiedError(exceptions.RayTaskError("run", words, ValueError()))


@pytest.mark.parametrize(
    ("error", "alive", "kind", "cause"),
    [
        (exceptions.NodeDiedError("gone"), False, FailureKind.INFRASTRUCTURE, Cause.NODE),
        (exceptions.WorkerCrashedError(), True, FailureKind.INFRASTRUCTURE, Cause.WORKER),
        (exceptions.OutOfMemoryError("killed"), True, FailureKind.INFRASTRUCTURE, Cause.MEMORY),
        (exceptions.OutOfDiskError("full"), True, FailureKind.INFRASTRUCTURE, Cause.DISK),
        (exceptions.RuntimeEnvSetupError("no"), True, FailureKind.INFRASTRUCTURE, Cause.WORKER),
        (exceptions.ActorUnschedulableError("no"), True, FailureKind.INFRASTRUCTURE, Cause.PLACE),
        (exceptions.ActorDiedError(), True, FailureKind.INFRASTRUCTURE, Cause.WORKER),
        (exceptions.ActorDiedError(), False, FailureKind.INFRASTRUCTURE, Cause.NODE),
        (died("(1) The process is killed by SIGKILL by OOM killer"), True, FailureKind.INFRASTRUCTURE, Cause.WORKER),
        (died("killed due to the node running low on memory"), True, FailureKind.INFRASTRUCTURE, Cause.MEMORY),
        (exceptions.ActorUnavailableError("connection refused", b"0" * 16), True, FailureKind.INFRASTRUCTURE, Cause.NODE),
        (StopIteration(), True, FailureKind.INFRASTRUCTURE, Cause.WORKER),
        (exceptions.TaskCancelledError(), True, FailureKind.CANCELLED, Cause.UNKNOWN),
        (raised(DtypeError("no")), True, FailureKind.APPLICATION, Cause.UNKNOWN),
        (raised(ValueError("a bug")), True, FailureKind.APPLICATION, Cause.UNKNOWN),
        (raised(OSError(errno.ENOSPC, "full")), True, FailureKind.INFRASTRUCTURE, Cause.DISK),
    ],
)
def test_failure_of_each_exception_of_ray(error: BaseException, alive: bool, kind: FailureKind, cause: Cause) -> None:
    failure = failure_of(error, NODE, alive=alive, drained=False)
    assert (failure.kind, failure.cause) == (kind, cause)
    assert failure.message


def test_failure_of_own_error_keeps_its_class_and_advice() -> None:
    failure = failure_of(raised(DtypeError("70000 does not fit", "use bfloat16")), NODE, alive=True, drained=False)
    assert (failure.error, failure.advice) == ("DtypeError", "use bfloat16")


def test_failure_of_anything_on_a_drained_node_is_a_hand_over() -> None:
    failure = failure_of(exceptions.ActorDiedError(), NODE, alive=False, drained=True)
    assert (failure.kind, failure.cause) == (FailureKind.HANDED_OVER, Cause.DRAIN)
    own = failure_of(raised(ValueError("a bug")), NODE, alive=True, drained=True)
    assert own.kind is FailureKind.APPLICATION


def test_kernel_lines_are_those_on_memory_since_the_worker_began() -> None:
    records = [
        "6,1,1000000,-;Out of memory: Killed process 1 (old)",
        "6,2,5000000,-;eth0: link up",
        "4,3,6000000,-;python invoked oom-killer: gfp_mask=0x0\n SUBSYSTEM=x",
        "3,4,6100000,-;oom-kill:constraint=CONSTRAINT_MEMCG,task=python,pid=77",
        "3,5,6200000,-;Memory cgroup out of memory: Killed process 77 (python) total-vm:1kB",
        "garbage",
    ]
    assert kernel_lines(records, 4.0) == [
        "python invoked oom-killer: gfp_mask=0x0",
        "oom-kill:constraint=CONSTRAINT_MEMCG,task=python,pid=77",
        "Memory cgroup out of memory: Killed process 77 (python) total-vm:1kB",
    ]


def test_facts_here_are_of_this_process() -> None:
    facts = facts_here("id")
    assert facts.node_id == "id"
    assert facts.process_id > 0
    assert facts.boot_seconds > 0
