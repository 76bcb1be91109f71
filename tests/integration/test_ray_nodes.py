"""Three real Ray nodes: what the bed itself promises, then what a build on it survives."""

from __future__ import annotations

from pathlib import Path

from tests.models.bed_build import BedBuild
from tests.models.ray_nodes import RayNodes


def test_ray_nodes_killed_and_restored_are_seen_by_the_cluster(ray_nodes: RayNodes) -> None:
    assert ray_nodes.alive() == {1, 2, 3}
    seen = ray_nodes.run(3, "bash", "-c", f"hostname; ls /tmp/ray; touch {ray_nodes.scratch}/mine")
    assert seen.stdout.startswith("node3\n")
    assert "mine" not in ray_nodes.run(2, "ls", str(ray_nodes.scratch)).stdout
    ray_nodes.kill(3)
    ray_nodes.wait_alive(1, 2)
    ray_nodes.restore()
    assert ray_nodes.alive() == {1, 2, 3}


def test_build_on_three_nodes_converts_on_several_and_publishes(ray_nodes: RayNodes, tiny_llama: Path) -> None:
    build = BedBuild(ray_nodes, tiny_llama, "quiet")
    build.start(2)
    assert build.wait() == 0, build.explain()
    assert len(build.nodes_of("convert")) >= 2
    assert build.of("failed") == []
    (nodes,) = build.of("nodes")
    assert {node["node"].partition("/")[0] for node in nodes["nodes"]} == {"node1", "node2", "node3"}
    assert all(node["store_error"] == "" and node["mpiexec"] for node in nodes["nodes"])
