"""Which idle worker takes a step: a decision without Ray."""

from __future__ import annotations

import pytest

from actors.step_actor import ConvertActor, EngineActor, StepActor
from actors.workers import Worker
from orchestrator.planning.steps import Kind, Resources
from orchestrator.scheduling.placement import Node, Placed
from tests.support.placing import GB, node
from tests.support.plans import task

NODE = node("a", cpus=4, memory=16 * GB)


def step(kind: Kind, memory: int, *, where: Node = NODE, **rest: int) -> Placed:
    made = task("step", kind, memory_bytes=memory, **rest)
    return Placed(made, where, made.step.resources)


def worker(kind: type[StepActor], memory: int) -> Worker:
    return Worker(None, kind, NODE, Resources(cpus=1, memory_bytes=memory))


@pytest.mark.parametrize(("held", "fits"), [(2 * GB, True), (3 * GB, True), (int(1.9 * GB), True), (GB, False)])
def test_worker_holding_about_what_a_step_of_its_kind_needs_or_more_takes_it(held: int, fits: bool) -> None:
    assert worker(EngineActor, held).fits(step(Kind.BUILD, 2 * GB)) is fits


@pytest.mark.parametrize(("held", "fits"), [(4 * GB, True), (5 * GB, False)])
def test_worker_holding_more_than_its_cores_share_of_the_node_leaves_a_small_step(held: int, fits: bool) -> None:
    assert worker(EngineActor, held).fits(step(Kind.BUILD, GB)) is fits


def test_worker_for_engines_converts_between_two_and_a_converter_builds_none() -> None:
    assert worker(EngineActor, 2 * GB).fits(step(Kind.CONVERT, GB))
    assert not worker(ConvertActor, 2 * GB).fits(step(Kind.BUILD, GB))


def test_worker_takes_nothing_on_another_node_or_for_other_cores_or_gpus() -> None:
    idle = worker(EngineActor, 2 * GB)
    assert not idle.fits(step(Kind.BUILD, 2 * GB, where=node("b", cpus=4, memory=16 * GB)))
    assert not idle.fits(step(Kind.BUILD, 2 * GB, cpus=2))
    assert not idle.fits(step(Kind.BUILD, 2 * GB, gpus=1))
