"""Faults of a real cluster, by name: each is done to a bed while a build runs there, at a moment that a seed chooses."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from tests.models.bed_build import BedBuild, is_start_of
from tests.models.ray_nodes import HEAD, RayNodes

_KINDS = ("convert", "reference", "build", "verify")
_ORPHAN_SECONDS = 60.0


def step_processes(bed: RayNodes, node: int) -> list[int]:
    """Ids of the node's processes that run a step, actors and what they started."""
    space = Path(f"/proc/{bed.first_process(node)}/ns/pid").readlink()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = (folder / "ns/pid").readlink() == space
            words = (folder / "cmdline").read_bytes() if mine else b""
        except OSError:
            continue
        if (words.startswith(b"ray::") and b"Actor" in words) or b"orchestrator.work" in words:
            found.append(int(folder.name))
    return found


def actors(bed: RayNodes, node: int) -> list[int]:
    """Ids of the node's actors."""
    return [found for found in step_processes(bed, node) if b"ray::" in Path(f"/proc/{found}/cmdline").read_bytes()]


class Scene:
    """A build on a bed, and what chance decides about it."""

    def __init__(self, bed: RayNodes, build: BedBuild, seed: int) -> None:
        self.bed, self.build, self.random = bed, build, random.Random(seed)
        self.driver_node = self.random.choice(bed.nodes[1:])
        self.told = ""
        """What was done, for the table."""
        self.drivers = 0

    def drive(self) -> None:
        """Start a driver, in its node while that lives."""
        self.drivers += 1
        self.build.start(self.driver_node)

    def at_random_start(self) -> str | None:
        """Wait for a random step to begin; name of its kind, None when the build ended before."""
        kind = self.random.choice(_KINDS)
        skip = self.random.randrange(2)
        line = self.build.until(is_start_of(kind), 240)
        for _ in range(skip if kind in ("convert", "build") else 0):
            line = self.build.until(is_start_of(kind), 240) if line is not None else None
        return kind if line is not None else None

    def victim(self, *, but: tuple[int, ...] = ()) -> int:
        """The node of the step that began last where that may be; else any other node that may be."""
        started = [int(line["node"].partition("/")[0].removeprefix("node")) for line in self.build.of("started")]
        fair = [node for node in self.bed.nodes if node not in but]
        return started[-1] if started and started[-1] in fair else self.random.choice(fair)


def kill_node(scene: Scene) -> None:
    kind = scene.at_random_start()
    node = scene.victim(but=(HEAD, scene.driver_node))
    scene.bed.kill(node)
    scene.told = f"node{node} killed in {kind}"


def cut_link(scene: Scene) -> None:
    kind = scene.at_random_start()
    node = scene.victim(but=(HEAD, scene.driver_node))
    scene.bed.cut(node)
    scene.told = f"node{node} cut off in {kind}"


def kill_actor(scene: Scene) -> None:
    kind = scene.at_random_start()
    node = scene.victim()
    found = actors(scene.bed, node)
    if found:
        os.kill(scene.random.choice(found), signal.SIGKILL)
    scene.told = f"{'actor' if found else 'no actor'} killed on node{node} in {kind}"


def kill_driver(scene: Scene) -> None:
    kind = scene.at_random_start()
    scene.build.kill()
    scene.told = f"driver killed in {kind}"
    scene.bed.wait(lambda: not any(step_processes(scene.bed, node) for node in scene.bed.nodes), "orphans to end", _ORPHAN_SECONDS)
    scene.drive()


def restart_head(scene: Scene) -> None:
    kind = scene.at_random_start()
    scene.bed.kill(HEAD)
    scene.bed.start(HEAD)
    scene.told = f"head killed and restarted in {kind}"


def fill_scratch(scene: Scene) -> None:
    node = scene.random.choice(scene.bed.nodes)
    scene.bed.fill_scratch(node)
    scene.told = f"scratch of node{node} full from the start"


FAULTS: dict[str, Callable[[Scene], None]] = {
    "node killed": kill_node,
    "link cut": cut_link,
    "actor killed": kill_actor,
    "driver killed": kill_driver,
    "head restarted": restart_head,
    "scratch full": fill_scratch,
}
