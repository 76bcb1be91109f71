"""Watch live and draining nodes from a thread: while the head is away, its answers take long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

import ray

from orchestrator.planning.steps import Resources
from orchestrator.scheduling.placement import Node

_PERIOD_SECONDS = 0.5


class NodeWatch:
    """Nodes of the last answer, until the next one arrives."""

    def __init__(self) -> None:
        self.nodes: tuple[Node, ...] = read_nodes()
        self.drained: set[str] = set()
        """Ids of nodes that were seen draining, dead ones too."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * _PERIOD_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_SECONDS):
            with contextlib.suppress(Exception):  # the head may be away: the last answer stays
                self.nodes = read_nodes()
                self.drained.update(node.node_id for node in self.nodes if node.leaves_at is not None)


def read_nodes() -> tuple[Node, ...]:
    """Return the live nodes."""
    leaving = draining_nodes()
    return tuple(_node(found, leaving) for found in ray.nodes() if found["Alive"])


def _node(found: Mapping[str, Any], leaving: Mapping[str, float]) -> Node:
    node_id, has = found["NodeID"], found["Resources"]
    capacity = Resources(cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0)), memory_bytes=int(has.get("memory", 0)))
    name = node_name(found["NodeManagerHostname"], node_id)
    return Node(node_id, name, capacity, dict(found.get("Labels") or {}), leaving.get(node_id))


def node_name(host: str, node_id: str) -> str:
    """Return the host's name with the start of Ray's node id, which distinguishes nodes of one host."""
    return f"{host}/{node_id[:6]}"


def draining_nodes() -> dict[str, float]:
    """Return when draining nodes will be gone: seconds since 1970 by node id, infinite when unknown.

    Ray has no public call for this (Ray Serve and Ray Train use the same one). Where it is missing, no node is known to be
    draining, and the end of a node is a failure like any other.
    """
    try:
        from ray._private.worker import global_worker

        found = global_worker.gcs_client.get_draining_nodes()
        return {node_id: deadline / 1000 if deadline else float("inf") for node_id, deadline in found.items()}
    except Exception:
        return {}
