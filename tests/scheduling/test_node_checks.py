"""The nodes' answers against the plan and the cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.base.errors import ClusterError, OrchestratorError, SourceMissingError, StoreError, ToolError
from orchestrator.events.nodes import GpuFacts, NodeFacts, unfit
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.scheduling.node_checks import check_nodes, read_locations
from orchestrator.spec.build import TopologySpec
from orchestrator.spec.cluster import ClusterSpec, PoolSpec

GPU = GpuFacts(name="NVIDIA H100", compute_capability="9.0", memory_bytes=80 * 10**9)
H100 = PoolSpec(labels={"ray.io/accelerator-type": "H100"})


@pytest.fixture(scope="module")
def made(tiny_llama: Path) -> Plan:
    from orchestrator.spec.build import BuildSpec
    from orchestrator.spec.decoding import decode

    plain = {
        "source": {"path": str(tiny_llama)},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "release": {"name": "tiny", "version": "1"},
    }
    return preparation.plan(decode(BuildSpec, plain, "test"))


def node(made: Plan, name: str = "a", **changes: Any) -> NodeFacts:
    version = made.inputs.tensorrt_version or ""
    facts = {
        "node": name, "cpus": 8, "memory_bytes": 10**12, "shm_free_bytes": 10**9,
        "places": dict.fromkeys(read_locations(made.steps), True), "versions": {"tensorrt_rtx": version},
        **changes,
    }  # fmt: skip
    return NodeFacts(**facts)


def of_tensorrt(made: Plan, tp: int) -> Plan:
    """The plan for GPU nodes of a driver without TensorRT, so that no version is asked for."""
    spec = made.spec.model_copy(
        update={"topology": TopologySpec(tp=tp), "engine": made.spec.engine.model_copy(update={"backend": "tensorrt"})}
    )
    return preparation.plan(spec)


def place(**pools: PoolSpec) -> ClusterSpec:
    return ClusterSpec(kind="ray", store="file:///store", pools=pools or {"default": PoolSpec()})


def own(warnings: tuple[str, ...]) -> list[str]:
    """Without those of the package's version, which depends on how the tests were installed."""
    return [warning for warning in warnings if not warning.startswith("trt-orchestrator differs")]


def test_read_locations_are_the_folders_that_steps_read(made: Plan) -> None:
    assert read_locations(made.steps) == [made.inputs.source]


def test_check_nodes_all_well_says_nothing(made: Plan) -> None:
    assert own(check_nodes(made, made.steps, place(), [node(made), node(made, "b")])) == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"error": "gave no answer in 60 s"}, ClusterError, "no node of the cluster answers: a did not answer"),
        ({"cpus": 0}, ClusterError, "no node for miniature steps"),
        ({"store_error": "cannot reach the store"}, StoreError, "no node can reach the store .*a: cannot reach the store"),
        ({"places": None}, SourceMissingError, "no node can see the files of reference steps: a: .* is missing"),
        ({"versions": {}}, ToolError, "a: tensorrt-rtx is not installed"),
        ({"versions": {"tensorrt_rtx": "0.1"}}, ToolError, "a: tensorrt-rtx 0.1, planned with"),
    ],
)
def test_check_nodes_what_no_node_has_is_an_error_with_its_name(
    made: Plan, changes: dict[str, Any], error: type[OrchestratorError], words: str
) -> None:
    if "places" in changes:
        changes = {"paths": {made.inputs.source: False}}
    with pytest.raises(error, match=words):
        check_nodes(made, made.steps, place(), [node(made, **changes)])
    if error is not ClusterError:
        warnings = own(check_nodes(made, made.steps, place(), [node(made, **changes), node(made, "b")]))
        assert warnings
        assert all("a" in warning and "left out" in warning for warning in warnings)


def test_check_nodes_labels_that_no_node_carries_are_named(made: Plan) -> None:
    with pytest.raises(ClusterError, match=r"none with CPUs carries the labels .*H100.*; the nodes: a .*L40S"):
        check_nodes(made, made.steps, place(default=H100), [node(made, labels={"ray.io/accelerator-type": "L40S"})])


def test_check_nodes_fallback_labels_count(made: Plan) -> None:
    pool = H100.model_copy(update={"fallback": ({"ray.io/accelerator-type": "L40S"},)})
    assert own(check_nodes(made, made.steps, place(default=pool), [node(made, labels={"ray.io/accelerator-type": "L40S"})])) == []


def gpu_plan(made: Plan) -> Plan:
    """As if it were built with the backend that needs a GPU."""
    steps = [
        step.model_copy(update={"resources": step.resources.model_copy(update={"gpus": 1})}) if step.rank is not None else step
        for step in made.steps
    ]
    return Plan(made.spec, made.inputs, tuple(steps))


def test_check_nodes_gpus_that_are_not_there_are_an_error(made: Plan) -> None:
    wanted = gpu_plan(made)
    with pytest.raises(ClusterError, match="needs 1 GPU: none of a offers one"):
        check_nodes(wanted, wanted.steps, place(), [node(made)])
    with pytest.raises(ClusterError, match="no driver finds a GPU on a"):
        check_nodes(wanted, wanted.steps, place(), [node(made, gpus=1)])


def test_check_nodes_gpus_of_two_kinds_are_a_warning(made: Plan) -> None:
    kinds = [GpuFacts(name="H100", memory_bytes=1, compute_capability="9.0"), GpuFacts(name="L40S", memory_bytes=1)]
    nodes = [node(made, name, gpus=1, devices=(kind,)) for name, kind in zip("ab", kinds, strict=True)]
    (warning,) = own(check_nodes(gpu_plan(made), gpu_plan(made).steps, place(), nodes))
    assert "may run on different GPUs (H100, L40S)" in warning


def test_check_nodes_versions_that_differ_are_a_warning(made: Plan) -> None:
    version = made.inputs.tensorrt_version or ""
    nodes = [node(made, name, versions={"ray": name, "tensorrt_rtx": version}) for name in "ab"]
    assert "ray differs: a on a; b on b" in check_nodes(made, made.steps, place(), nodes)


@pytest.mark.parametrize("version", ["11.0.0.114", "11.1.2", "10.16.1"])
def test_check_nodes_where_tensorrt_drops_collectives_is_an_error_before_any_step(made: Plan, version: str) -> None:
    split = of_tensorrt(made, tp=2)
    with pytest.raises(ToolError, match=f"a: tensorrt {version} can drop the collectives of tp=2") as caught:
        check_nodes(split, split.steps, place(), [node(split, versions={"tensorrt": version}, gpus=1, devices=(GPU,))])
    assert "tensorrt-cu13>=11.2" in caught.value.advice


@pytest.mark.parametrize(("version", "tp"), [("11.2.0", 2), ("11.4.0.106", 2), ("11.0.0.114", 1)])
def test_check_nodes_where_tensorrt_keeps_collectives_or_there_are_none_says_nothing(made: Plan, version: str, tp: int) -> None:
    plan = of_tensorrt(made, tp)
    nodes = [node(plan, versions={"tensorrt": version}, gpus=1, devices=(GPU,))]
    assert own(check_nodes(plan, plan.steps, place(), nodes)) == []


def test_unfit_node_whose_tensorrt_drops_collectives_gets_no_build_step_and_every_other(made: Plan) -> None:
    plan = of_tensorrt(made, tp=2)
    facts = node(plan, versions={"tensorrt": "11.1.0"}, gpus=1, devices=(GPU,))
    refused = {step.kind.value for step in plan.steps if unfit(facts, step)}
    assert refused == {"build"}
