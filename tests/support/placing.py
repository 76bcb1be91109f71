"""Nodes that only their description makes, for decisions about where steps go."""

from __future__ import annotations

from typing import Any

from orchestrator.planning.steps import Resources
from orchestrator.scheduling.placement import Node

GB = 10**9


def node(name: str, cpus: int = 2, gpus: int = 0, memory: int = 10 * GB, **rest: Any) -> Node:
    return Node(name, name, Resources(cpus=cpus, gpus=gpus, memory_bytes=memory), **rest)
