"""What a terminal shows of a build."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orchestrator.events import NodesProbed
from orchestrator.events.nodes import NodeFacts
from orchestrator.report import LiveView


@pytest.mark.parametrize(("count", "said"), [(1, "1 node: 2 CPU slots"), (3, "3 nodes: 6 CPU slots")])
def test_view_counts_nodes_as_people_do(count: int, said: str) -> None:
    text = io.StringIO()
    nodes = tuple(NodeFacts(node=f"node-{number}", cpus=2, memory_bytes=10**9) for number in range(count))
    LiveView(Console(file=text, width=80)).on(NodesProbed(nodes=nodes))
    assert text.getvalue().strip() == said
