"""The Cluster protocol on Ray: one actor per attempt, placed by resources and labels, events streamed back.

Retries are the driver's: actors have none of Ray's own. Ray's would be used up before a lost node is known to be lost. No
placement group: ranks are built independently. Only JSON of a few kilobytes travels through Ray.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.convert_actor import ConvertActor
from actors.engine_actor import EngineActor
from actors.quantize_actor import QuantizeActor
from actors.step_actor import StepActor
from actors.verify_actor import VerifyActor
from orchestrator.clusters import AnyEvent, worker_environment
from orchestrator.core.errors import ClusterError
from orchestrator.core.progress import EVENT, StepFailed, StepSucceeded
from orchestrator.core.spec import ClusterSpec, PoolSpec
from orchestrator.core.step import Failure, FailureKind, Task

ACTORS: dict[str, type[StepActor]] = {
    kind.value: actor for actor in (ConvertActor, QuantizeActor, EngineActor, VerifyActor) for kind in actor.kinds
}
"""Which actor runs a kind of step."""

_OBJECT_STORE_BYTES = 200 * 10**6
_WAIT_SECONDS = 1.0
"""One look at the streams; an interrupt is answered between two."""


class RayCluster:
    """See orchestrator.clusters.Cluster."""

    def __init__(self, spec: ClusterSpec) -> None:
        """Connect to spec.address, or start Ray on this machine. Raises ClusterError."""
        self._spec = spec
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _connect(spec)
        self._node_memory = max((int(node["Resources"].get("memory", 0)) for node in ray.nodes()), default=0)
        self._streams: dict[Any, tuple[Task, Any]] = {}
        """Ray's generator of a running attempt -> its task and actor."""

    def start(self, task: Task) -> None:
        pool = self._spec.pool_for(task.step.kind.value) or PoolSpec()
        actor = ray.remote(ACTORS[task.step.kind.value]).options(**self._options(task, pool)).remote()
        stream = actor.run.options(num_returns="streaming").remote(task.model_dump_json())
        self._streams[stream] = (task, actor)

    def events(self, timeout_seconds: float | None) -> list[AnyEvent]:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            left = _WAIT_SECONDS if deadline is None else min(max(deadline - time.monotonic(), 0.0), _WAIT_SECONDS)
            found = self._poll(left)
            if found or (deadline is not None and time.monotonic() >= deadline):
                return found

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        for _, actor in self._streams.values():
            ray.kill(actor, no_restart=True)
        self._streams.clear()
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()

    def _options(self, task: Task, pool: PoolSpec) -> dict[str, Any]:
        resources = task.step.resources
        return {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            # A step that asks for more than any node has gets a whole one instead of waiting for ever.
            "memory": min(resources.memory_bytes, self._node_memory),
            "label_selector": dict(pool.labels),
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": worker_environment(self._spec.threads_per_step, gpu=resources.gpus > 0)},
        }

    def _poll(self, timeout_seconds: float) -> list[AnyEvent]:
        if not self._streams:
            time.sleep(timeout_seconds)
            return []
        ready, _ = ray.wait(list(self._streams), num_returns=len(self._streams), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(self._streams), num_returns=1, timeout=timeout_seconds)
        return [event for stream in ready if (event := self._next(stream)) is not None]

    def _next(self, stream: Any) -> AnyEvent | None:
        task, actor = self._streams[stream]
        event: AnyEvent
        try:
            event = EVENT.validate_json(ray.get(next(stream)))
        except GetTimeoutError:
            return None
        except (StopIteration, RayError) as error:
            event = StepFailed(digest=task.step.digest, failure=_failure(error))
        if isinstance(event, (StepSucceeded, StepFailed)):
            del self._streams[stream]
            ray.kill(actor, no_restart=True)
        return event


def _connect(spec: ClusterSpec) -> None:
    # Ray 2.60 decides by itself when this is unset, and then differs between nodes.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if spec.address is not None or os.environ.get("RAY_ADDRESS"):
        options["address"] = spec.address or "auto"
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


def _failure(error: BaseException) -> Failure:
    """Lost actors, nodes and memory are the machinery's failures; an exception in our own code is not."""
    if isinstance(error, RayTaskError):
        return Failure(kind=FailureKind.APPLICATION, message=str(error.cause), log_tail=str(error))
    if isinstance(error, StopIteration):
        return Failure(kind=FailureKind.INFRASTRUCTURE, message="the actor ended without a final event")
    first = str(error).splitlines()[0] if str(error) else ""
    return Failure(kind=FailureKind.INFRASTRUCTURE, message=f"{type(error).__name__}: {first}", log_tail=str(error))
