"""Faults of a real cluster, by name: each is done to a bed while a build runs there, at a moment that a seed chooses."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from tests.support.bed_build import BedBuild, Line, is_start_of
from tests.support.ray_nodes import GUEST, HEAD, RayNodes

_LASTS = {"convert": 0.2, "miniature": 3.0, "reference": 3.0, "build": 1.0, "verify": 1.0}
"""About how long a step of a kind of the tiny build runs, seconds: the fault falls into that time."""
OUTAGE_SECONDS = 90.0
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

    def __init__(self, bed: RayNodes, build: BedBuild, fault: str | None, seed: int) -> None:
        self.bed, self.build, self.random = bed, build, random.Random(seed)
        # A driver that is to live is not on a node that may be struck.
        self.driver_node = HEAD if fault in ("node killed", "link cut") else self.random.choice(bed.nodes[1:])
        self.told = "nothing ran: no fault"
        """What was done, for the table."""
        self.drivers = 0

    def drive(self) -> None:
        """Start a driver, in its node while that lives."""
        self.drivers += 1
        self.build.start(self.driver_node)

    def moment(self, nodes: Collection[int]) -> int | None:
        """Wait for a random moment of a random kind of step on one of the nodes; the node. What runs is told.

        Where that step has ended already (the shortest take milliseconds), the next that runs on one of the nodes is taken.
        None when the build ended before.
        """
        kind, share = self.random.choice(sorted(_LASTS)), self.random.random()
        line = self.build.until(lambda line: is_start_of(kind)(line) and node_of(line) in nodes, 240)
        if line is not None:
            self._linger(line["step"], share * _LASTS[kind])
        while True:
            running = [each for each in self.build.running().values() if node_of(each) in nodes]
            if running:
                chosen = next((each for each in running if line is not None and each["step"] == line["step"]), running[-1])
                self.told = f"{chosen['step']} on node{node_of(chosen)} ran for {time.time() - chosen['read_at']:.1f} s"
                return node_of(chosen)
            if self.build.until(lambda line: line["event"] == "started" and node_of(line) in nodes, 240) is None:
                return None

    def _linger(self, step: str, seconds: float) -> None:
        """Let a step run for so long, or to its end."""
        end = time.monotonic() + seconds
        self.build.read()
        while time.monotonic() < end and step in self.build.running():
            time.sleep(0.01)
            self.build.read()


def node_of(line: Line) -> int:
    """Number of the node that a line names."""
    return int(line["node"].partition("/")[0].removeprefix("node"))


def kill_node(scene: Scene) -> None:
    node = scene.moment(scene.bed.nodes[1:])
    if node is not None:
        scene.bed.kill(node)
        scene.told = f"node{node} killed: {scene.told}"


def cut_link(scene: Scene) -> None:
    node = scene.moment(scene.bed.nodes[1:])
    if node is not None:
        scene.bed.cut(node)
        scene.told = f"node{node} cut off: {scene.told}"


def kill_actor(scene: Scene) -> None:
    node = scene.moment(scene.bed.nodes)
    if node is None:
        return
    found = actors(scene.bed, node)
    busy = [each for each in found if b".run" in Path(f"/proc/{each}/cmdline").read_bytes()]
    if found:
        os.kill(scene.random.choice(busy or found), signal.SIGKILL)
    scene.told = f"{'actor' if found else 'no actor'} killed: {scene.told}"


def kill_driver(scene: Scene) -> None:
    if scene.moment(scene.bed.nodes) is None:
        return
    scene.build.kill()
    scene.told = f"driver killed: {scene.told}"
    scene.bed.wait(lambda: not any(step_processes(scene.bed, node) for node in scene.bed.nodes), "orphans to end", _ORPHAN_SECONDS)
    scene.drive()


def restart_head(scene: Scene) -> None:
    if scene.moment(scene.bed.nodes[1:]) is not None:
        scene.bed.kill(HEAD)
        scene.bed.start(HEAD)
        scene.told = f"head killed and restarted: {scene.told}"


def fill_scratch(scene: Scene) -> None:
    node = scene.moment(scene.bed.nodes)
    if node is not None:
        scene.bed.fill_scratch(node)
        scene.told = f"scratch of node{node} filled: {scene.told}"


def cut_store(scene: Scene) -> None:
    if scene.moment(scene.bed.nodes) is None:
        return
    scene.bed.cut(GUEST)
    end = time.monotonic() + OUTAGE_SECONDS
    scene.told = f"store cut off for {OUTAGE_SECONDS:.0f} s: {scene.told}"
    while time.monotonic() < end and scene.build.alive:
        scene.build.read()
        time.sleep(0.1)
    scene.bed.connect(GUEST)


FAULTS: dict[str, Callable[[Scene], None]] = {
    "node killed": kill_node,
    "link cut": cut_link,
    "actor killed": kill_actor,
    "driver killed": kill_driver,
    "head restarted": restart_head,
    "scratch full": fill_scratch,
}
LONG_FAULTS: dict[str, Callable[[Scene], None]] = {"store outage": cut_store}
"""Each takes minutes: not among the others unless asked for."""
