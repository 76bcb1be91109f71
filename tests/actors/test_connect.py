"""A cluster that is not where the cluster file says."""

from __future__ import annotations

import socket

import pytest

from actors import RayCluster
from orchestrator.base.errors import ClusterError
from orchestrator.spec.cluster import ClusterSpec


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("by_environment", [False, True])
def test_cluster_where_nobody_answers_is_refused_at_once(
    closed_port: int, by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{closed_port}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if by_environment:
        monkeypatch.setenv("RAY_ADDRESS", address)
    spec = ClusterSpec(kind="ray", store="memory://", address="auto" if by_environment else address)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}: .*refused"):
        RayCluster(spec)
