"""Which step begins where: decisions without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import ClusterError
from orchestrator.events.nodes import GpuFacts, NodeFacts
from orchestrator.planning.steps import Cause, Failure, FailureKind, Kind, Task
from orchestrator.scheduling.placement import Node, Placement, check_pools, selects
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from tests.support.placing import GB, node
from tests.support.plans import task


def spec(store: str = "file:///store", **pools: PoolSpec) -> ClusterSpec:
    return ClusterSpec(kind="ray", store=store, pools=pools or {"default": PoolSpec()}, schedule_timeout_seconds=100.0)


def placement(nodes: list[Node], tasks: list[Task], place: ClusterSpec | None = None) -> Placement:
    made = Placement(place or spec())
    made.update(nodes)
    for each in tasks:
        made.add(each, 0.0)
    return made


def begun(made: Placement, now: float = 0.0) -> list[tuple[str, str]]:
    return [(placed.task.step.name, placed.node.name) for placed in made.begin(now)]


def gpus(made: Placement) -> list[tuple[str, tuple[int, ...]]]:
    return [(placed.task.step.name, placed.gpus) for placed in made.begin(0.0)]


def lost(cause: Cause) -> Failure:
    return Failure(kind=FailureKind.INFRASTRUCTURE, cause=cause, message="lost")


def test_begin_spreads_steps_over_the_nodes_in_order_of_arrival() -> None:
    made = placement([node("a"), node("b")], [task(f"c{number}") for number in range(5)])
    assert begun(made) == [("c0", "a"), ("c1", "b"), ("c2", "a"), ("c3", "b")]
    assert begun(made) == []
    made.end(task("c2").step.digest, 1.0)
    assert begun(made) == [("c4", "a")]


def test_begin_a_task_of_smaller_order_passes_those_that_came_before() -> None:
    late, first = (task(name).model_copy(update={"order": order}) for name, order in (("late", 7), ("first", 3)))
    made = placement([node("a", cpus=1)], [late, first])
    assert begun(made) == [("first", "a")]


def test_begin_labels_choose_the_nodes_and_fallback_labels_when_those_are_full() -> None:
    pool = PoolSpec(labels={"gpu": "H100"}, fallback=({"gpu": "L40S"},))
    nodes = [node("plain"), node("large", cpus=1, labels={"gpu": "H100"}), node("small", cpus=1, labels={"gpu": "L40S"})]
    made = placement(nodes, [task("x"), task("y"), task("z")], spec(default=pool))
    assert begun(made) == [("x", "large"), ("y", "small")]


def test_begin_a_step_that_fits_passes_one_that_does_not() -> None:
    made = placement([node("a", gpus=1)], [task("one", gpus=1), task("two", gpus=1), task("cpu")])
    assert begun(made) == [("one", "a"), ("cpu", "a")]


def test_begin_memory_is_reserved_and_more_than_a_node_has_means_the_whole_node() -> None:
    tasks = [task("huge", memory_bytes=99 * GB), task("next", memory_bytes=GB)]
    made = placement([node("a")], tasks)
    assert begun(made) == [("huge", "a")]
    made.end(tasks[0].step.digest, 1.0)
    assert begun(made) == [("next", "a")]


def test_begin_a_pool_that_promises_more_memory_than_a_node_has_still_runs_its_steps_alone() -> None:
    tasks = [task("huge", memory_bytes=50 * GB), task("next", memory_bytes=GB)]
    made = placement([node("a")], tasks, spec(default=PoolSpec(memory=99 * GB)))
    assert begun(made) == [("huge", "a")]
    made.end(tasks[0].step.digest, 1.0)
    assert begun(made) == [("next", "a")]


def test_begin_memory_of_a_pool_is_a_limit_for_its_steps_together() -> None:
    tasks = [task("first", memory_bytes=4 * GB), task("large", memory_bytes=4 * GB), task("small", memory_bytes=GB)]
    made = placement([node("a", cpus=3)], tasks, spec(default=PoolSpec(memory=6 * GB)))
    assert begun(made) == [("first", "a"), ("small", "a")]


def test_begin_pools_share_a_node_and_each_keeps_its_own_limit() -> None:
    pools = {"one": PoolSpec(cpus=1, steps=("convert",)), "two": PoolSpec(cpus=3)}
    tasks = [task("a"), task("b"), *(task(f"build{number}", Kind.BUILD) for number in range(4))]
    assert begun(placement([node("n", cpus=8)], tasks, spec(**pools))) == [
        ("a", "n"), ("build0", "n"), ("build1", "n"), ("build2", "n"),
    ]  # fmt: skip
    assert begun(placement([node("n", cpus=2)], tasks, spec(**pools))) == [("a", "n"), ("build0", "n")]
    large = [task("c", memory_bytes=6 * GB), task("build", Kind.BUILD, memory_bytes=6 * GB)]
    assert begun(placement([node("n", cpus=8)], large, spec(**pools))) == [("c", "n")]


def test_begin_of_equally_loaded_nodes_the_one_with_less_memory_held_comes_first() -> None:
    tasks = [task("x", memory_bytes=2 * GB), task("y", memory_bytes=GB), task("z")]
    assert begun(placement([node("a"), node("b")], tasks)) == [("x", "a"), ("y", "b"), ("z", "b")]


def test_begin_steps_of_a_node_get_different_gpus_and_give_them_back() -> None:
    tasks = [task(f"build{number}", Kind.BUILD, gpus=1) for number in range(3)]
    made = placement([node("a", cpus=8, gpus=2)], [*tasks, task("pair", Kind.CALIBRATE, gpus=2)])
    assert gpus(made) == [("build0", (0,)), ("build1", (1,))]
    made.end(tasks[0].step.digest, 1.0)
    assert gpus(made) == [("build2", (0,))]
    for each in tasks[1:]:
        made.end(each.step.digest, 2.0)
    assert gpus(made) == [("pair", (0, 1))]


def test_held_bytes_are_those_of_all_pools_on_the_node() -> None:
    pools = {"one": PoolSpec(steps=("convert",)), "two": PoolSpec()}
    tasks = [task("a", memory_bytes=GB), task("b", Kind.BUILD, memory_bytes=3 * GB)]
    made = placement([node("n")], tasks, spec(**pools))
    begun(made)
    assert made.held_bytes(node("n")) == 4 * GB
    made.end(tasks[0].step.digest, 1.0)
    assert made.held_bytes(node("n")) == 3 * GB


def test_begin_ranks_of_a_stage_hold_their_cores_on_one_node() -> None:
    verify = task("verify", Kind.VERIFY, cpus=3)
    made = placement([node("a", cpus=2), node("b", cpus=4)], [task("x"), verify, task("y"), task("z")])
    assert dict(begun(made))["verify"] == "b"
    assert made.num_waiting == 0


def facts(name: str, **rest: Any) -> NodeFacts:
    return NodeFacts(node=name, node_id=name, **rest)


def test_begin_scratch_is_reserved_where_the_store_is_remote() -> None:
    tasks = [task("one", Kind.BUILD, scratch_bytes=6 * GB), task("two", Kind.BUILD, scratch_bytes=6 * GB)]
    for store, expected in (("s3://bucket", 1), ("file:///store", 2)):
        made = placement([node("a")], tasks, spec(store))
        made.learn([facts("a", scratch_free_bytes=10 * GB)])
        assert len(begun(made)) == expected


def test_begin_goes_where_the_source_is() -> None:
    made = placement([node("a"), node("b")], [task(name, locations={"source": "/models"}) for name in ("x", "y", "z")])
    made.learn([facts("a", paths={"/models": False}), facts("b", paths={"/models": True})])
    assert begun(made) == [("x", "b"), ("y", "b")]


@pytest.mark.parametrize(
    ("what", "kind", "resources"),
    [
        ({"error": "silent"}, Kind.CONVERT, {}),
        ({"store_error": "refused"}, Kind.CONVERT, {}),
        ({"devices": ()}, Kind.BUILD, {"gpus": 1}),
    ],
)
def test_begin_a_node_that_cannot_is_left_out(what: dict[str, Any], kind: Kind, resources: dict[str, int]) -> None:
    made = placement([node("a", gpus=1), node("b", gpus=1)], [task("x", kind, **resources)])
    device = (GpuFacts(name="H100", memory_bytes=1),)
    made.learn([facts("a", **what), facts("b", devices=device)])
    assert begun(made) == [("x", "b")]


def test_begin_a_draining_node_gets_nothing_new() -> None:
    made = placement([node("a", leaves_at=1e9), node("b", cpus=1)], [task("x"), task("y")])
    assert begun(made) == [("x", "b")]
    assert not made.has_other(task("x").step, "b")
    assert made.has_other(task("x").step, "a")


def test_end_a_lost_node_is_avoided_by_the_step_and_suspected_for_others() -> None:
    tasks = [task("x"), task("y")]
    made = placement([node("a"), node("b")], tasks[:1])
    assert begun(made) == [("x", "a")]
    made.end(tasks[0].step.digest, 10.0, lost(Cause.NODE))
    made.add(tasks[1], 10.0)
    made.add(tasks[0], 10.0)
    assert begun(made, 11.0) == [("y", "b"), ("x", "b")]
    for each in tasks:
        made.end(each.step.digest, 50.0)
        made.add(each, 50.0)
    assert begun(made, 50.0) == [("x", "b"), ("y", "a")]


def test_end_a_step_that_failed_everywhere_may_go_anywhere() -> None:
    made = placement([node("a")], [task("x")])
    begun(made)
    made.end(task("x").step.digest, 1.0, lost(Cause.DISK))
    made.add(task("x"), 1.0)
    assert begun(made, 2.0) == [("x", "a")]


def test_end_out_of_memory_lets_fewer_run_at_once_on_that_node() -> None:
    tasks = [task(f"t{number}") for number in range(8)]
    made = placement([node("a", cpus=4)], tasks)
    assert len(begun(made)) == 4
    made.end(tasks[0].step.digest, 1.0, lost(Cause.MEMORY))
    assert begun(made, 1.0) == []
    made.end(tasks[1].step.digest, 2.0, lost(Cause.MEMORY))
    assert begun(made, 2.0) == []
    made.end(tasks[2].step.digest, 3.0)
    assert [name for name, _ in begun(made, 3.0)] == ["t4"]
    for each in tasks[3:5]:
        made.end(each.step.digest, 4.0)
    assert len(begun(made, 4.0)) == 2


def test_end_out_of_memory_of_one_alone_still_lets_one_run() -> None:
    made = placement([node("a")], [task("x")])
    begun(made)
    made.end(task("x").step.digest, 1.0, lost(Cause.MEMORY))
    made.add(task("x"), 1.0)
    made.add(task("y"), 1.0)
    assert begun(made, 2.0) == [("x", "a")]


def test_overdue_work_that_nobody_can_take_ends_with_what_it_asks_for_and_what_there_is() -> None:
    pool = PoolSpec(labels={"gpu": "H100"})
    made = placement([node("a", labels={"gpu": "L40S"})], [task("x", gpus=1)], spec(default=pool))
    assert begun(made) == []
    assert made.overdue(99.0) == []
    (given_up,) = made.overdue(100.0)
    assert (given_up.digest, given_up.failure.cause) == (task("x", gpus=1).step.digest, Cause.PLACE)
    assert isinstance(given_up.failure.to_error("x"), ClusterError)
    asked, have = "1 CPU, 1 GPU with labels {'gpu': 'H100'}", "a: labels {'gpu': 'L40S'}"
    assert given_up.failure.message == f"no node could take it for 100 s: it asks for {asked}; the nodes: {have}"
    assert made.num_waiting == 0


def test_overdue_work_that_waits_for_others_to_end_never_is() -> None:
    made = placement([node("a", cpus=1)], [task("x"), task("y")])
    begun(made)
    assert made.overdue(1e6) == []
    made.update([])
    assert made.overdue(1e6 + 99.0) == []
    (given_up,) = made.overdue(1e6 + 100.0)
    assert given_up.digest == task("y").step.digest
    assert given_up.failure.message.endswith("; the nodes: none is alive")


def test_put_back_a_step_that_did_not_begin_waits_again_for_another_node() -> None:
    made = placement([node("a"), node("b")], [task("x")])
    assert begun(made) == [("x", "a")]
    made.put_back(task("x").step.digest, 5.0, avoid=True)
    assert begun(made, 5.0) == [("x", "b")]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.integers(0, 8)), max_size=30),
    nodes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.integers(1, 8)), min_size=1, max_size=4),
)
def test_begin_never_promises_more_than_a_node_has(sizes: list[tuple[int, int, int]], nodes: list[tuple[int, int, int]]) -> None:
    there = [node(str(number), cpus, gpus, memory) for number, (cpus, gpus, memory) in enumerate(nodes)]
    tasks = [task(str(number), cpus=cpus, gpus=gpus, memory_bytes=memory) for number, (cpus, gpus, memory) in enumerate(sizes)]
    made = placement(there, tasks)
    ended = 0
    while True:
        placed = list(made.begin(0.0))
        for each in there:
            held = [one.held for one in placed if one.node == each]
            assert sum(one.cpus for one in held) <= each.capacity.cpus
            assert sum(one.gpus for one in held) <= each.capacity.gpus
            assert sum(one.memory_bytes for one in held) <= each.capacity.memory_bytes
        for one in placed:
            made.end(one.task.step.digest, 0.0)
        ended += len(placed)
        if not placed:
            break
    possible = [size for size in sizes if size[1] <= max(gpus for _, gpus, _ in nodes)]
    assert ended == len(possible)


def test_check_pools_labels_of_no_node_are_refused_with_what_the_nodes_have() -> None:
    with pytest.raises(ClusterError, match="no node has the labels of pool gpu") as caught:
        check_pools(spec(gpu=PoolSpec(labels={"gpu": "H100"})), [node("a", labels={"gpu": "L40S"})])
    assert "a {'gpu': 'L40S'}" in caught.value.advice


def test_check_pools_a_node_with_fewer_gpus_than_its_pool_names_is_refused() -> None:
    pool = PoolSpec(gpus=2, labels={"gpu": "H100"}, fallback=({"gpu": "L40S"},))
    there = [node("a", gpus=2, labels={"gpu": "H100"}), node("b", gpus=1, labels={"gpu": "L40S"}), node("other")]
    check_pools(spec(gpu=pool), there[::2])
    with pytest.raises(ClusterError, match="node b has 1 GPUs, but pool gpu needs 2"):
        check_pools(spec(gpu=pool), there)


@pytest.mark.parametrize(
    ("condition", "value", "expected"),
    [("H100", "H100", True), ("H100", "L40S", False), ("H100", None, False), ("!H100", "L40S", True), ("!H100", None, True),
     ("in(H100, L40S)", "L40S", True), ("in(H100,L40S)", "A100", False), ("!in(H100,L40S)", "A100", True),
     ("!in(H100)", None, True)],
)  # fmt: skip
def test_selects_as_rays_label_selectors_do(condition: str, value: str | None, expected: bool) -> None:
    assert selects({"gpu": condition}, {} if value is None else {"gpu": value}) is expected


def test_begin_on_a_node_of_absurdly_many_gpus_takes_as_many_as_the_step_needs() -> None:
    made = placement([node("a", gpus=10**18)], [task("x", gpus=2)])
    assert gpus(made) == [("x", (0, 1))]
