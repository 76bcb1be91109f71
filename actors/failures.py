"""Causes of Ray's exceptions.

Listed one by one: a lost node or memory is no subclass of RayActorError, and an exception of our own code arrives as RayError too.
"""

from __future__ import annotations

from ray import exceptions

from actors.postmortem import Evidence
from orchestrator.planning.steps import Cause, Failure, FailureKind
from orchestrator.scheduling.placement import Node
from orchestrator.work.failures import cause_of

_CAUSES: tuple[tuple[type[BaseException], Cause], ...] = (
    (exceptions.OutOfMemoryError, Cause.MEMORY),
    (exceptions.OutOfDiskError, Cause.DISK),
    (exceptions.ObjectStoreFullError, Cause.DISK),
    (exceptions.NodeDiedError, Cause.NODE),
    (exceptions.LocalRayletDiedError, Cause.NODE),
    (exceptions.ActorUnschedulableError, Cause.PLACE),
    (exceptions.TaskUnschedulableError, Cause.PLACE),
    (exceptions.ActorPlacementGroupRemoved, Cause.PLACE),
    (exceptions.TaskPlacementGroupRemoved, Cause.PLACE),
    (exceptions.WorkerCrashedError, Cause.WORKER),
    (exceptions.RuntimeEnvSetupError, Cause.WORKER),
    (exceptions.ObjectLostError, Cause.WORKER),
    (exceptions.RpcError, Cause.NODE),
    (exceptions.ActorUnavailableError, Cause.NODE),  # no answer: the node may be dead before the cluster knows
    (exceptions.RayActorError, Cause.WORKER),
)
_MEMORY_WORDS = ("running low on memory",)
"""Words of Ray's memory monitor. Ray mentions the kernel's OOM killer for every killed worker, so those words prove nothing."""
_NODE_WORDS = ("node has died", "node died", "node was terminated", "node failure", "marked dead", "expected termination: node")


def failure_of(error: BaseException, node: Node, *, alive: bool, drained: bool) -> Failure:
    """Return the failure of an attempt whose stream ended with `error`. `alive`, `drained`: the cluster's view of the node now."""
    if isinstance(error, exceptions.RayTaskError):
        return _own(error, node)
    if isinstance(error, exceptions.TaskCancelledError):
        return Failure(kind=FailureKind.CANCELLED, message="the step was cancelled", node=node.name)
    if isinstance(error, exceptions.AuthenticationError):
        return Failure(kind=FailureKind.APPLICATION, message=str(error), error="ClusterError", node=node.name)
    if drained or getattr(error, "preempted", False):
        message = f"{node.name} was taken back before the step had ended"
        return Failure(kind=FailureKind.HANDED_OVER, cause=Cause.DRAIN, message=message, node=node.name)
    text = str(error)
    cause = _cause(error, text, alive)
    return Failure(
        kind=FailureKind.INFRASTRUCTURE, cause=cause, message=_message(error, cause, node), node=node.name, traceback=text
    )


def with_evidence(failure: Failure, evidence: Evidence) -> Failure:
    """Add its node's evidence to the failure of a lost worker: Ray does not report whether memory was the cause."""
    update: dict[str, object] = {"worker_log": evidence.worker_log, "kernel": evidence.kernel}
    if evidence.kernel and failure.cause is not Cause.MEMORY:
        killed = f"the worker on {failure.node} was killed for memory by the kernel"
        update |= {"cause": Cause.MEMORY, "message": failure.message.replace(f"the worker on {failure.node} was lost", killed, 1)}
    return failure.model_copy(update=update)


def _own(error: exceptions.RayTaskError, node: Node) -> Failure:
    """Return the failure of an error inside the actor but outside of the step: ours, unless memory, disk or network caused it."""
    raised = error.cause if isinstance(error.cause, BaseException) else error
    cause = cause_of(raised)
    kind = FailureKind.APPLICATION if cause is Cause.UNKNOWN else FailureKind.INFRASTRUCTURE
    failure = Failure.of(raised, node.name)
    return failure.model_copy(update={"kind": kind, "cause": cause, "traceback": str(error)})


def _cause(error: BaseException, text: str, alive: bool) -> Cause:
    if isinstance(error, StopIteration):
        return Cause.WORKER if alive else Cause.NODE
    cause = next((cause for kind, cause in _CAUSES if isinstance(error, kind)), Cause.WORKER)
    if cause is Cause.WORKER and any(words in text for words in _MEMORY_WORDS):
        return Cause.MEMORY
    if cause is Cause.WORKER and (not alive or any(words in text for words in _NODE_WORDS)):
        return Cause.NODE
    return cause


def _message(error: BaseException, cause: Cause, node: Node) -> str:
    what = {
        Cause.NODE: f"node {node.name} was lost",
        Cause.WORKER: f"the worker on {node.name} was lost",
        Cause.MEMORY: f"the worker on {node.name} was killed for memory",
        Cause.DISK: f"{node.name} has no disk space left",
    }.get(cause, "Ray could not run the step")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{what} ({type(error).__name__}{': ' + lines[0] if lines else ''})"
