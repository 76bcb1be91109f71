"""Three real Ray nodes: what the bed itself promises, then what a build on it survives."""

from __future__ import annotations

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
