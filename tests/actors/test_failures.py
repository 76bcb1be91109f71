"""What Ray's exceptions mean, and what a dead worker leaves behind."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from ray import exceptions

from actors import postmortem
from actors.failures import failure_of, with_evidence
from actors.postmortem import Evidence, WorkerFacts, facts_here
from orchestrator.base.errors import DtypeError
from orchestrator.planning.steps import Cause, FailureKind, Resources
from orchestrator.scheduling.placement import Node
from orchestrator.work.lost import memory_group

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


def test_examine_finds_the_end_of_stderr_and_the_kills_since_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "worker.err"
    log.write_text("x" * 5000 + "last words")
    facts = WorkerFacts(node_id="id", group="/mine", log=str(log), oom_kills=2)
    monkeypatch.setattr(postmortem, "oom_kills", {"/mine": 3}.__getitem__)
    found = postmortem.examine(facts)
    assert found.worker_log.endswith("last words")
    assert len(found.worker_log) == 4000
    assert found.kernel.startswith("the kernel killed 1 processes")
    monkeypatch.setattr(postmortem, "oom_kills", {"/mine": 2}.__getitem__)
    assert postmortem.examine(facts).kernel == ""


def test_memory_group_is_that_of_version_one_else_the_only_one() -> None:
    assert memory_group("9:name=systemd:/a\n4:memory:/b/c\n0::/\n") == "/b/c"
    assert memory_group("0::/kubepods/d\n") == "/kubepods/d"
    assert memory_group("1:cpu:/\n") == ""


def test_with_evidence_a_worker_that_the_kernel_killed_was_lost_to_memory() -> None:
    lost = failure_of(died("(1) The process is killed by SIGKILL by OOM killer"), NODE, alive=True, drained=False)
    found = with_evidence(lost, Evidence(worker_log="last words", kernel="Killed process 77"))
    assert (found.cause, found.kernel, found.worker_log) == (Cause.MEMORY, "Killed process 77", "last words")
    assert found.message.startswith("the worker on host/id was killed for memory by the kernel (ActorDiedError")
    assert with_evidence(lost, Evidence(worker_log="x")).cause is Cause.WORKER


def test_facts_here_are_of_this_process() -> None:
    facts = facts_here("id")
    assert facts.node_id == "id"
    assert facts.oom_kills >= 0
