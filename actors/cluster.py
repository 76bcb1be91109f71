"""The Cluster protocol on Ray: each attempt runs in an actor on the node chosen by Placement and streams its events back.

The driver retries; actors have none of Ray's retries, which would be used up before a lost node is known to be lost. No placement
group is needed, because ranks are built independently. Only JSON of a few kilobytes travels through Ray.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.failures import failure_of, with_evidence
from actors.node_watch import NodeWatch
from actors.postmortem import Evidence, WorkerFacts, examine
from actors.step_actor import Message
from actors.workers import Worker, Workers
from orchestrator.base.errors import ClusterError, Interrupted
from orchestrator.events import STEP_EVENT, StepEvent, StepFailed
from orchestrator.events.nodes import NodeFacts
from orchestrator.planning.steps import Cause, Failure, FailureKind, Task
from orchestrator.scheduling.cluster import worker_environment
from orchestrator.scheduling.placement import Placed, Placement, unplaced
from orchestrator.scheduling.retry import leaves_drained_node
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.work.probe import probe_here
from orchestrator.work.process import end_descendants, scratch_root
from orchestrator.work.scratch import remove_dead

_OBJECT_STORE_BYTES = 200 * 10**6
_WAIT_SECONDS = 0.5
"""Timeout of one wait for the streams. Interrupts and new nodes are noticed in between."""
_ANSWER_SECONDS = 10.0
"""Longest wait for the head to accept a connection."""
_PATIENCE_SECONDS = 60.0
"""Time after which a worker that has not begun is tried on another node."""
_EVIDENCE_SECONDS = 5.0
"""Longest wait of a dead worker's failure for evidence from its node."""
_LOOK_SECONDS = 0.25
"""Interval of the checks that depend on time and nodes."""
_DEMAND_SECONDS = 5.0
_DYING_SECONDS = 1.0
_WORKER_NAME = "ray::"
"""Beginning of a worker's command line."""


@dataclass
class _Attempt:
    placed: Placed
    worker: Worker
    since: float
    began: float | None = None
    """Time of the worker's first message. None: it has not begun."""
    facts: WorkerFacts | None = None


class RayCluster:
    """See orchestrator.clusters.Cluster, and Probing."""

    def __init__(self, spec: ClusterSpec) -> None:
        """Connect to spec.address, or start Ray on this machine. Raises ClusterError."""
        self._spec = spec
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            try:
                _connect(spec)
            except BaseException as error:  # nobody else knows of the started processes
                if not isinstance(error, Interrupted | SystemExit):
                    ray.shutdown()
                raise
        self._watch = NodeWatch()
        self._placement = Placement(spec)
        self._workers = Workers(spec.threads_per_step)
        self._attempts: dict[Any, _Attempt] = {}
        """Attempts by Ray's generator of their messages."""
        self._inquests: dict[Any, tuple[StepFailed, float]] = {}
        """Failures that wait for evidence, with the deadline, by reference of the task that looks for it."""
        self._looked_at = 0.0
        self._known: Set[str] = set()
        self._asked_at = 0.0
        self._asked: list[dict[str, float]] = []
        self._closed = False

    def start(self, task: Task) -> None:
        self._placement.add(task, self.now())

    def events(self, timeout_seconds: float | None) -> list[StepEvent]:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            left = _WAIT_SECONDS if deadline is None else min(max(deadline - time.monotonic(), 0.0), _WAIT_SECONDS)
            found = self._look_after()
            self._begin()
            found += self._poll(0.0 if found else left)
            if found or (deadline is not None and time.monotonic() >= deadline):
                return found

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._watch.close()
        self._attempts.clear()
        self._inquests.clear()
        with contextlib.suppress(RayError):
            self._workers.close()
            if self._asked:
                _demand([])
        interrupted = isinstance(sys.exc_info()[1], Interrupted)
        if interrupted:
            # The program is about to end and kills its processes: Ray's own shutdown takes seconds and sometimes crashes.
            end_descendants(_WORKER_NAME, _DYING_SECONDS)
        elif self._owns_ray and ray.is_initialized():
            ray.shutdown()
        if self._owns_ray and self._spec.address is None:  # the workers were on this machine and have ended
            with contextlib.suppress(OSError):
                remove_dead(scratch_root(self._spec.scratch), _DYING_SECONDS if interrupted else 0.0)

    def probe(self, paths: Iterable[str]) -> list[NodeFacts]:
        """Ask every node in a small task. A node without an answer in time gets an error."""
        environment = {"env_vars": worker_environment(1, gpu=False)}
        asked = {}
        for node in self._watch.nodes:
            remote = ray.remote(probe_here).options(
                num_cpus=0, max_retries=0, label_selector={"ray.io/node-id": node.node_id}, runtime_env=environment
            )
            spec = self._spec
            asked[remote.remote(spec.store, spec.store_options.model_dump_json(), spec.scratch, list(paths))] = node
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self._spec.probe_timeout_seconds) if asked else ([], [])
        found = []
        for reference, node in asked.items():
            if reference not in ready:
                ray.cancel(reference, force=True)
            found.append(self._answer(reference if reference in ready else None).model_copy(update=node.offer()))
        self._placement.learn(found)
        return found

    def _answer(self, reference: Any) -> NodeFacts:
        if reference is None:
            return NodeFacts(node="", error=f"silent for {self._spec.probe_timeout_seconds:.0f} s")
        try:
            return NodeFacts.model_validate_json(ray.get(reference))
        except RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return NodeFacts(node="", error=lines[-1].strip() if lines else type(error).__name__)

    def _begin(self) -> None:
        """Start the steps that may begin now."""
        if self._closed or not self._placement.num_waiting:
            return
        self._placement.update(self._watch.nodes)
        now = self.now()
        for placed in self._placement.begin(now):
            worker = self._workers.take(placed)
            stream = worker.actor.run.options(num_returns="streaming").remote(placed.task.model_dump_json())
            self._attempts[stream] = _Attempt(placed, worker, now)

    def _look_after(self) -> list[StepEvent]:
        """Check time and nodes: steps to move off a node, steps that wait in vain, evidence that does not arrive."""
        now, nodes = self.now(), {node.node_id: node for node in self._watch.nodes}
        self._placement.update(nodes.values())
        self._workers.sweep(now, {node.node_id for node in nodes.values() if node.leaves_at is not None})
        found: list[StepEvent] = []
        if now < self._looked_at + _LOOK_SECONDS and nodes.keys() == self._known:
            return found
        self._looked_at, self._known = now, nodes.keys()
        for stream, attempt in list(self._attempts.items()):
            node = nodes.get(attempt.placed.node.node_id)
            leaves_at = node.leaves_at if node is not None else 0.0
            if attempt.began is None:
                found.extend(self._look_after_waiting(stream, attempt, now, stays=leaves_at is None))
            elif node is not None and leaves_at is not None:
                found.extend(self._look_after_leaving(stream, attempt, now, leaves_at - time.time()))
        found.extend(self._placement.overdue(now))
        for reference, (event, until) in list(self._inquests.items()):
            if now >= until:
                del self._inquests[reference]
                found.append(self._ended(event))
        self._ask_for_nodes(now)
        return found

    def _look_after_waiting(self, stream: Any, attempt: _Attempt, now: float, *, stays: bool) -> list[StepEvent]:
        """Check a worker that has not begun: its node may be gone, or full of other work."""
        step, waited = attempt.placed.task.step, now - attempt.since
        other = waited > _PATIENCE_SECONDS and self._placement.has_other(step, attempt.placed.node.node_id)
        if not stays or other:
            self._drop(stream)
            self._placement.put_back(step.digest, now, avoid=stays)
        elif waited > self._spec.schedule_timeout_seconds:
            self._drop(stream)
            message = f"did not begin on {attempt.placed.node.name} for {waited:.0f} s: other work holds the resources"
            return [self._ended(unplaced(step.digest, message))]
        return []

    def _look_after_leaving(self, stream: Any, attempt: _Attempt, now: float, left: float) -> list[StepEvent]:
        step, node = attempt.placed.task.step, attempt.placed.node
        elapsed = now - (attempt.began or now)
        if not leaves_drained_node(left, elapsed, step.estimate.seconds) or not self._placement.has_other(step, node.node_id):
            return []
        self._drop(stream)
        message = f"{node.name} is taken back in {left:.0f} s, too soon for this step"
        failure = Failure(kind=FailureKind.HANDED_OVER, cause=Cause.DRAIN, message=message, node=node.name)
        self._placement.end(step.digest, now, failure)
        return [StepFailed(digest=step.digest, failure=failure)]

    def _poll(self, timeout_seconds: float) -> list[StepEvent]:
        pending = [*self._attempts, *self._inquests]
        if not pending:
            time.sleep(timeout_seconds)
            return []
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
        if not ready and timeout_seconds > 0:
            ready, _ = ray.wait(pending, num_returns=1, timeout=timeout_seconds, fetch_local=False)
        return [event for item in ready for event in (self._next(item) if item in self._attempts else [self._conclude(item)])]

    def _next(self, stream: Any) -> list[StepEvent]:
        """Receive the next messages of a worker."""
        attempt = self._attempts[stream]
        try:
            messages: list[Message] = ray.get(next(stream))
        except GetTimeoutError:
            return []
        except (StopIteration, RayError) as error:
            return self._broken(stream, attempt, error)
        found = []
        for what, text in messages:
            if what == "worker":
                attempt.began, attempt.facts = self.now(), WorkerFacts.model_validate_json(text)
            elif what == "event":
                found.append(STEP_EVENT.validate_json(text))
            else:
                self._finish(stream, found[-1], int(text))
        return found

    def _finish(self, stream: Any, event: StepEvent, resting_bytes: int) -> None:
        """End an attempt. A worker whose step failed is not used again."""
        failure = event.failure if isinstance(event, StepFailed) else None
        worker = self._attempts.pop(stream).worker
        if failure is None:
            self._workers.give_back(worker, resting_bytes, self.now())
        else:
            self._workers.end(worker)
        self._placement.end(event.digest, self.now(), failure)

    def _drop(self, stream: Any) -> None:
        """End the worker of an attempt, and ignore it from now on."""
        self._workers.end(self._attempts.pop(stream).worker)

    def _broken(self, stream: Any, attempt: _Attempt, error: BaseException) -> list[StepEvent]:
        """Handle a stream that ended without a final event."""
        digest, node = attempt.placed.task.step.digest, attempt.placed.node
        self._drop(stream)
        alive = any(other.node_id == node.node_id for other in self._watch.nodes)
        failure = failure_of(error, node, alive=alive, drained=node.node_id in self._watch.drained)
        event = StepFailed(digest=digest, failure=failure)
        if not alive or attempt.facts is None or failure.cause not in (Cause.WORKER, Cause.MEMORY):
            return [self._ended(event)]
        looking = ray.remote(examine).options(num_cpus=0, max_retries=0, label_selector={"ray.io/node-id": node.node_id})
        self._inquests[looking.remote(attempt.facts)] = (event, self.now() + _EVIDENCE_SECONDS)
        return []

    def _conclude(self, reference: Any) -> StepFailed:
        """Return the failure with its node's evidence about the worker."""
        event, _ = self._inquests.pop(reference)
        try:
            evidence: Evidence = ray.get(reference)
        except RayError:
            return self._ended(event)
        return self._ended(event.model_copy(update={"failure": with_evidence(event.failure, evidence)}))

    def _ended(self, event: StepFailed) -> StepFailed:
        """Free a lost worker's room. The cause of the loss decides how many steps its node may run."""
        self._placement.end(event.digest, self.now(), event.failure)
        return event

    def _ask_for_nodes(self, now: float) -> None:
        """Report the demand of waiting steps to an autoscaler; without one, the report has no effect."""
        if now - self._asked_at < _DEMAND_SECONDS:
            return
        self._asked_at = now
        wanted = self._placement.bundles() if self._placement.num_waiting else []
        if wanted != self._asked:
            self._asked = wanted
            _demand(wanted)


def _demand(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    with contextlib.suppress(Exception):  # only a hint: the build continues without it
        request_resources(bundles=bundles)


def _check_answers(address: str) -> None:
    """Fail at once where Ray would retry for minutes. Raises ClusterError."""
    given = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = given.rpartition(":")
    if "/" in given or not host or not port.isdecimal():
        return  # a URL, or empty: Ray finds the cluster
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {given}: {error}",
            "Check the address in the cluster file, or RAY_ADDRESS: the head's HOST:6379, not its dashboard's.",
        ) from None


def _connect(spec: ClusterSpec) -> None:
    # If unset, Ray 2.60 chooses a value that may differ between nodes.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if spec.address is not None or os.environ.get("RAY_ADDRESS"):
        options["address"] = spec.address or "auto"
        _check_answers(options["address"])
    else:
        pools = spec.pools.values()
        cpus = [pool.cpus for pool in pools if pool.cpus]
        options |= {
            "num_cpus": max(cpus) if cpus else None,
            "num_gpus": max(pool.gpus for pool in pools) or None,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cannot connect to Ray at {options.get('address', 'this machine')}: {error}",
            "Check the address in the cluster file, and RAY_AUTH_MODE on both sides.",
        ) from None
