"""Three real Ray nodes: what the bed itself promises, then what a build on it survives. The driver runs on node 2."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.bed_build import BedBuild, Line, is_start_of, published, started_again
from tests.support.bed_faults import actors, step_processes
from tests.support.ray_nodes import HEAD, RayNodes
from tests.support.tiny import write_tiny_llama

UNPROVEN: dict[str, Any] = {"topology": {"tp": 2, "pp": 1}, "verification": {"enabled": False}}
"""Two engines, and nothing executed: faults in converts and engine builds are seen in a few seconds."""


WORKERS = {"default": {"labels": {"role": "worker"}}}
"""Nodes 2 and 3: of two engines one is built on each."""

ENGINES_AWAY = {
    "engines": {"steps": ["build"], "labels": {"index": "3"}},
    "default": {"labels": {"index": "2"}},
}
"""Both engines on node 3, at once, and nothing else there."""
WIDE = {"num_hidden_layers": 1, "hidden_size": 256, "vocab_size": 300_000}
WIDE_BYTES = 800 * 10**6
"""An engine of such a model takes 670 MB while it is built: room for one, not for two."""


def fresh(bed: RayNodes, source: Path, version: str, pools: Any = None, **sections: Any) -> BedBuild:
    """A build with a store of its own: every step runs."""
    return BedBuild(bed, source, version, f"file://{bed.folder}/stores/{version}", pools, **{**UNPROVEN, **sections})


def number(line: Line) -> int:
    """Of the node that a line names."""
    return int(line["node"].partition("/")[0].removeprefix("node"))


def begins_away(kind: str) -> Callable[[Line], bool]:
    """Whether a line says that a step of a kind began on node 3."""
    return lambda line: is_start_of(kind)(line) and number(line) == 3


def ends_well(build: BedBuild) -> None:
    assert build.wait() == 0, build.explain()
    assert started_again(build) == []


def at_once(build: BedBuild, node: int, after: str = "") -> int:
    """Most attempts that ran at a time on a node, of those that the driver saw begin after a time."""
    running, most = set[str](), 0
    for line in build.lines:
        if line["event"] == "started" and number(line) == node and line["time"] > after:
            running.add(line["step"])
        elif line["event"] in ("succeeded", "failed"):
            running.discard(line["step"])
        most = max(most, len(running))
    return most


def causes(build: BedBuild) -> set[tuple[str, str]]:
    return {(line["failure"]["kind"], line["failure"]["cause"]) for line in build.of("failed")}


def test_ray_nodes_killed_and_restored_are_seen_by_the_cluster(ray_nodes: RayNodes) -> None:
    assert ray_nodes.alive() == {1, 2, 3}
    seen = ray_nodes.run(3, "bash", "-c", f"hostname; ls /tmp/ray; touch {ray_nodes.scratch}/mine")
    assert seen.stdout.startswith("node3\n")
    assert "mine" not in ray_nodes.run(2, "ls", str(ray_nodes.scratch)).stdout
    ray_nodes.kill(3)
    ray_nodes.wait_alive(1, 2)
    ray_nodes.restore()
    assert ray_nodes.alive() == {1, 2, 3}


@pytest.mark.slow
def test_build_on_three_nodes_converts_on_several_and_publishes(ray_nodes: RayNodes, tiny_llama: Path) -> None:
    build = fresh(ray_nodes, tiny_llama, "quiet", verification={"max_tokens": 8, "decode_steps": 2})
    build.start(2)
    ends_well(build)
    assert len(build.nodes_of("convert")) >= 2
    assert build.of("failed") == []
    assert published(build) == ""
    (nodes,) = build.of("nodes")
    assert {node["node"].partition("/")[0] for node in nodes["nodes"]} == {"node1", "node2", "node3"}
    assert all(node["store_error"] == "" for node in nodes["nodes"])


@pytest.mark.slow
def test_build_killed_actor_then_killed_driver_go_on_where_they_were(ray_nodes: RayNodes, tiny_llama: Path) -> None:
    build = fresh(ray_nodes, tiny_llama, "killed", WORKERS)
    build.start(2)
    assert build.until(begins_away("build")), build.explain()
    for actor in actors(ray_nodes, 3):
        os.kill(actor, signal.SIGKILL)
    lost = build.until(lambda line: line["event"] == "failed")
    assert lost is not None, build.explain()
    failure = lost["failure"]
    assert (failure["kind"], failure["cause"], failure["node"].partition("/")[0]) == ("infrastructure", "worker", "node3")
    assert "ActorDiedError" in failure["message"]
    assert "class_name: EngineActor" in failure["traceback"]
    build.kill()
    ray_nodes.wait(lambda: not any(step_processes(ray_nodes, node) for node in ray_nodes.nodes), "orphans to end")
    committed = {line["step"] for line in build.of("succeeded")}
    build.start(3)
    ends_well(build)
    again = build.of("plan")[1]["pending"]
    assert committed
    assert committed.isdisjoint(again)


@pytest.mark.slow
def test_build_node_killed_with_head_in_the_middle_of_an_engine_ends_published(ray_nodes: RayNodes, tiny_llama: Path) -> None:
    build = fresh(ray_nodes, tiny_llama, "lost", WORKERS)
    build.start(2)
    assert build.until(begins_away("build")), build.explain()
    ray_nodes.kill(3)
    ray_nodes.kill(HEAD)
    ray_nodes.start(HEAD)
    ends_well(build)
    assert ("infrastructure", "node") in causes(build)
    assert {number(line) for line in build.of("started") if line["attempt"] > 1} == {2}


@pytest.mark.slow
def test_build_node_cut_off_in_the_middle_of_an_engine_ends_published_elsewhere(ray_nodes: RayNodes, tiny_llama: Path) -> None:
    build = fresh(ray_nodes, tiny_llama, "cut", WORKERS)
    build.start(2)
    assert build.until(begins_away("build")), build.explain()
    ray_nodes.cut(3)
    assert build.wait() == 0, build.explain()
    # The lost worker may commit after the driver looked for that, and before the second attempt begins: no other step begins again.
    assert set(started_again(build)) <= {line["step"] for line in build.of("retry")}
    assert {kind for kind, _ in causes(build)} == {"infrastructure"}
    # The folder that is the store is not cut off: what the lost worker commits late is taken instead of a second attempt.
    assert {number(line) for line in build.of("started") if line["attempt"] > 1} <= {2}


@pytest.mark.slow
def test_build_node_drained_in_the_middle_of_an_engine_ends_without_a_failed_step(ray_nodes: RayNodes, tiny_llama: Path) -> None:
    build = fresh(ray_nodes, tiny_llama, "drained", WORKERS)
    build.start(2)
    assert build.until(begins_away("build")), build.explain()
    ray_nodes.terminate(3)
    ends_well(build)
    ray_nodes.wait_ended(3)
    assert build.of("failed") == []
    assert build.of("retry") == []
    assert "node3" in build.nodes_of("build")


@pytest.mark.slow
def test_build_killed_for_memory_by_the_kernel_goes_on_with_fewer_at_once(ray_nodes: RayNodes, tmp_path: Path) -> None:
    if not ray_nodes.limits_memory:
        pytest.skip("no control group for memory can be made here")
    build = fresh(ray_nodes, write_tiny_llama(tmp_path / "wide", **WIDE), "memory", ENGINES_AWAY)
    ray_nodes.limit_memory(3, WIDE_BYTES)
    build.start(2)
    ends_well(build)
    assert causes(build) == {("infrastructure", "memory")}
    for line in build.of("failed"):
        assert "was killed for memory by the kernel" in line["failure"]["message"]
        assert "control group for memory" in line["failure"]["kernel"]
    assert at_once(build, 3) == 2
    assert at_once(build, 3, after=build.of("retry")[-1]["time"]) == 1
