from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints import companions, huggingface
from orchestrator.families.llama import LLAMA
from orchestrator.model.checkpoint import SourceFile
from orchestrator.model.config import ModelConfig
from orchestrator.model.weight_map import weight_map
from orchestrator.planning.options import ConvertOptions
from orchestrator.planning.places import unplaceable, with_offered_gpus
from orchestrator.planning.plan import Inputs, Plan, make_plan
from orchestrator.planning.quantization import resolve
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.report import describe_plan
from orchestrator.spec.build import BuildConfig, BuildSpec
from orchestrator.spec.cluster import ClusterSpec, PoolSpec
from orchestrator.stores.source import LocalFolder
from tests.support.plans import named, outcome_of
from tests.support.synthetic import build_spec, model_config, random_arrays, synthetic_index, write_source

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "plan_tiny.json"
QUANTIZABLE = model_config(hidden_size=64, intermediate_size=128)
"""All linears are multiples of 16, on two ranks too."""
TOKENIZER = SourceFile("tokenizer.json", 10, "sha256:tokenizer")


def plan_of(
    config: ModelConfig | None = None, extra: tuple[SourceFile, ...] = (TOKENIZER,), source: str = "/model", **sections: Any
) -> Plan:
    """The plan of a synthetic checkpoint; `sections` are those of the spec."""
    wanted = config or model_config()
    spec = build_spec(source, **sections)
    return _plan(spec, wanted, extra, source)


def _plan(spec: BuildSpec, config: ModelConfig, extra: tuple[SourceFile, ...], source: str) -> Plan:
    index = synthetic_index(config, num_files=2)
    quantization = resolve(spec.quantization, config.num_hidden_layers) if spec.quantization else None
    formats = quantization.model if quantization else None
    weights = weight_map(index, LLAMA, config, spec.topology.topology(), spec.conversion.max_shard_bytes, formats)
    return make_plan(spec, Inputs(index, extra, source, config, weights, "1.0", limited(spec), quantization, family="llama"))


def limited(spec: BuildSpec) -> BuildConfig:
    """The engine's limits as a plan holds them."""
    return spec.engine.model_copy(update={"max_seq_len": spec.engine.max_seq_len or 64})


def digests(plan: Plan, kind: Kind) -> list[str]:
    return [step.digest for step in plan.of_kind(kind)]


def commit(plan: Plan, *names: str) -> dict[str, Outcome]:
    return {step.digest: outcome_of(step) for step in plan.steps if step.name in names}


def test_make_plan_tiny_model_is_as_the_golden_file_says(tmp_path: Path) -> None:
    config = model_config(num_hidden_layers=3)
    arrays = random_arrays(config)
    folder = write_source(tmp_path / "source", config, arrays, num_files=2)
    spec = build_spec(folder, topology={"tp": 2, "pp": 2}, conversion={"max_shard_bytes": 4000})
    place = LocalFolder(folder)
    index = huggingface.read_index(place)
    weights = weight_map(index, LLAMA, config, spec.topology.topology(), spec.conversion.max_shard_bytes)
    inputs = Inputs(
        index, companions(place, place.names()), str(folder), config, weights, "1.7.1.116", limited(spec), family="llama"
    )
    text = json.dumps(describe_plan(make_plan(spec, inputs)), indent=1) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "plans changed: look at the difference, then run with UPDATE_GOLDEN=1"


def test_make_plan_has_one_step_per_group_rank_and_stage() -> None:
    plan = plan_of(topology={"tp": 2, "pp": 3})
    names = [step.name for step in plan.steps]
    assert len(set(names)) == len(names)
    assert names[:2] == ["miniature", "reference"]
    assert [name for name in names if name.startswith("build")] == [f"build/rank{rank}" for rank in range(6)]
    assert [name for name in names if name.startswith("verify")] == [f"verify/stage{stage}" for stage in range(3)]
    assert [name for name in names if name.startswith("convert")] == [f"convert/stage{stage}/group0" for stage in range(3)]


def test_make_plan_needs_stand_before_what_needs_them() -> None:
    plan = plan_of(topology={"tp": 2, "pp": 3}, conversion={"max_shard_bytes": 3000})
    seen: set[str] = set()
    for step in plan.steps:
        assert set(step.needs) <= seen
        seen.add(step.digest)


def test_make_plan_ranks_need_all_groups_of_their_stage_and_no_other() -> None:
    plan = plan_of(topology={"tp": 2, "pp": 2}, conversion={"max_shard_bytes": 1})
    for rank in range(4):
        needed = [plan.step(need).name for need in named(plan, f"build/rank{rank}").needs]
        assert needed == [step.name for step in plan.of_kind(Kind.CONVERT) if step.name.startswith(f"convert/stage{rank // 2}/")]
    assert len(list(plan.of_kind(Kind.CONVERT))) == 5  # embedding, three layers, head


def test_make_plan_verify_needs_reference_and_the_stage_before() -> None:
    plan = plan_of(topology={"pp": 2})
    first, second = plan.of_kind(Kind.VERIFY)
    assert {plan.step(need).name for need in first.needs} == {"convert/stage0/group0", "reference"}
    assert {plan.step(need).name for need in second.needs} == {"convert/stage1/group0", "reference", "verify/stage0"}


def test_make_plan_every_source_byte_is_read_once() -> None:
    plan = plan_of(topology={"tp": 2, "pp": 3}, conversion={"max_shard_bytes": 2000})
    assert sum(step.estimate.read_bytes for step in plan.of_kind(Kind.CONVERT)) == plan.inputs.index.num_bytes


def test_make_plan_without_verification_has_neither_reference_nor_verify() -> None:
    plan = plan_of(verification={"enabled": False})
    assert {step.kind for step in plan.steps} == {Kind.MINIATURE, Kind.CONVERT, Kind.BUILD}


@pytest.mark.parametrize("sections", [{}, {"verification": {"enabled": False}}, {"quantization": {"algorithm": "FP8"}}], ids=str)
def test_make_plan_miniature_is_first_needs_nothing_and_the_release_waits_for_it(sections: dict[str, Any]) -> None:
    plan = plan_of(QUANTIZABLE, **sections)
    first, *others = plan.steps
    assert (first.kind, first.needs) == (Kind.MINIATURE, ())
    assert all(first.digest not in step.needs for step in others)
    assert first in plan.sinks()
    committed = {step.digest: outcome_of(step) for step in others}
    assert plan.pending(committed) == [first]


def test_make_plan_miniature_is_the_same_for_every_topology_dtype_and_quantization() -> None:
    one = digests(plan_of(QUANTIZABLE), Kind.MINIATURE)
    assert one == digests(plan_of(QUANTIZABLE, topology={"tp": 2, "pp": 2}, quantization={"algorithm": "FP8"}), Kind.MINIATURE)
    assert one != digests(plan_of(QUANTIZABLE.model_copy(update={"use_parallel_embedding": True})), Kind.MINIATURE)


def test_make_plan_calibrated_algorithm_feeds_each_conversion_from_its_own_layers() -> None:
    plan = plan_of(model_config(num_hidden_layers=4), topology={"pp": 2}, quantization={"algorithm": "FP8"})
    first, second = plan.of_kind(Kind.CALIBRATE)
    assert (first.name, second.name) == ("calibrate/max/part0", "calibrate/max/part1")
    assert second.needs == (first.digest,)
    assert [step.needs for step in plan.of_kind(Kind.CONVERT)] == [(first.digest,), (second.digest,)]


def test_make_plan_data_free_algorithm_has_no_calibration() -> None:
    plan = plan_of(quantization={"algorithm": "W8A16"})
    assert not digests(plan, Kind.CALIBRATE)
    assert all(step.needs == () for step in plan.of_kind(Kind.CONVERT))


@pytest.mark.parametrize(
    "other", [{"algorithm": "W4A16_NVFP4"}, {"algorithm": "FP8", "kv_cache": "FP8"}, {"kv_cache": "INT8"}], ids=str
)
def test_make_plan_algorithms_that_need_only_amax_share_their_calibration(other: dict[str, Any]) -> None:
    one, two = (plan_of(QUANTIZABLE, quantization=chosen) for chosen in ({"algorithm": "FP8"}, other))
    assert digests(one, Kind.CALIBRATE) == digests(two, Kind.CALIBRATE)
    assert set(digests(one, Kind.CONVERT)).isdisjoint(digests(two, Kind.CONVERT))


def test_make_plan_calibration_depends_on_no_tensor_parallelism() -> None:
    one, two = (plan_of(QUANTIZABLE, topology={"tp": tp}, quantization={"algorithm": "FP8"}) for tp in (1, 2))
    assert digests(one, Kind.CALIBRATE) == digests(two, Kind.CALIBRATE)


def test_make_plan_calibration_in_its_own_number_of_parts_is_shared_by_pipelines() -> None:
    quantization = {"algorithm": "FP8", "calibration": {"num_stages": 1}}
    config = model_config(num_hidden_layers=4)
    one, two = (plan_of(config, topology={"pp": pp}, quantization=quantization) for pp in (1, 2))
    assert digests(one, Kind.CALIBRATE) == digests(two, Kind.CALIBRATE)


def test_make_plan_only_tensorrt_reserves_gpus() -> None:
    for backend, gpus in (("tensorrt", 1), ("tensorrt_rtx", 0)):
        plan = plan_of(engine={"backend": backend, "max_input_len": 16})
        assert {step.resources.gpus for step in plan.of_kind(Kind.BUILD)} == {gpus}
        assert {step.resources.gpus for step in plan.steps if step.kind is not Kind.BUILD} == {0}


def test_build_key_place_of_the_source_and_name_of_the_release_do_not_matter() -> None:
    moved = plan_of(source="/elsewhere", release={"name": "other", "version": "9"})
    assert moved.build_key == plan_of().build_key
    assert [step.digest for step in moved.steps] == [step.digest for step in plan_of().steps]


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": {"max_batch_size": 3, "max_input_len": 16, "max_seq_len": 64}},
        {"topology": {"tp": 2}},
        {"topology": {"pp": 2}},
        {"conversion": {"max_shard_bytes": 1000}},
        {"verification": {"max_tokens": 13, "decode_steps": 3}},
        {"verification": {"enabled": False}},
        {"quantization": {"algorithm": "FP8"}},
        {"config": model_config(dtype="float16")},
        {"config": model_config(rotary_base=5000.0)},
        {"extra": ()},
    ],
    ids=str,
)
def test_build_key_everything_that_decides_the_release_matters(sections: dict[str, Any]) -> None:
    assert plan_of(**sections).build_key != plan_of().build_key


def test_build_key_tokenizer_matters_without_verification() -> None:
    changed = replace(TOKENIZER, identity="sha256:another")
    off: dict[str, Any] = {"verification": {"enabled": False}}
    assert plan_of(extra=(changed,), **off).build_key != plan_of(**off).build_key


def test_make_plan_engine_options_change_no_conversion_and_no_verification() -> None:
    one, other = plan_of(), plan_of(engine={"max_batch_size": 7, "max_input_len": 16, "max_seq_len": 64})
    for kind in (Kind.REFERENCE, Kind.CONVERT, Kind.VERIFY):
        assert digests(one, kind) == digests(other, kind)
    assert set(digests(one, Kind.BUILD)).isdisjoint(digests(other, Kind.BUILD))


def test_make_plan_reference_is_shared_by_all_topologies() -> None:
    assert digests(plan_of(), Kind.REFERENCE) == digests(plan_of(topology={"tp": 2, "pp": 3}), Kind.REFERENCE)


def test_make_plan_changed_source_file_changes_only_what_reads_it() -> None:
    spec, config = build_spec("/model", conversion={"max_shard_bytes": 1}), model_config()
    before = _plan(spec, config, (), "/model")
    index = before.inputs.index
    touched = replace(index, files=(replace(index.files[0], identity="sha256:new"), index.files[1]))
    weights = weight_map(touched, LLAMA, config, spec.topology.topology(), 1)
    after = make_plan(spec, replace(before.inputs, index=touched, weights=weights))
    for one, other in zip(before.of_kind(Kind.CONVERT), after.of_kind(Kind.CONVERT), strict=True):
        read = {file.name for file in ConvertOptions.model_validate(one.options).files}
        assert (one.digest != other.digest) == (index.files[0].name in read)


def test_make_plan_another_tensorrt_changes_the_engines_alone() -> None:
    one = plan_of()
    other = make_plan(one.spec, replace(one.inputs, tensorrt_version="2.0"))
    assert set(digests(one, Kind.BUILD)).isdisjoint(digests(other, Kind.BUILD))
    assert digests(one, Kind.CONVERT) == digests(other, Kind.CONVERT)


def test_pending_nothing_committed_is_everything() -> None:
    plan = plan_of(topology={"pp": 2})
    assert plan.pending({}) == list(plan.steps)


def test_pending_committed_step_hides_what_only_it_needs() -> None:
    plan = plan_of(topology={"tp": 2}, verification={"enabled": False})
    assert [step.name for step in plan.pending(commit(plan, "miniature", "build/rank0"))] == [
        "convert/stage0/group0",
        "build/rank1",
    ]
    assert plan.pending(commit(plan, "miniature", "build/rank0", "build/rank1")) == []


def test_pending_verifications_hide_the_reference() -> None:
    plan = plan_of(topology={"pp": 2})
    left = {step.name for step in plan.pending(commit(plan, "miniature", "verify/stage0", "verify/stage1"))}
    assert left == {"convert/stage0/group0", "convert/stage1/group0", "build/rank0", "build/rank1"}


def test_pending_verification_of_an_earlier_stage_runs_again_because_the_release_is_checked_with_it() -> None:
    plan = plan_of(topology={"pp": 2})
    assert "verify/stage0" in {step.name for step in plan.pending(commit(plan, "miniature", "verify/stage1"))}


def test_pending_shards_that_are_published_are_made_again_under_committed_engines() -> None:
    plan = plan_of(release={"name": "tiny", "version": "1", "include": ["engines", "portable"]})
    done = [step.name for step in plan.steps if step.kind is not Kind.CONVERT]
    assert {step.name for step in plan.pending(commit(plan, *done))} == {"convert/stage0/group0"}


def test_build_key_of_other_parts_is_another_one() -> None:
    parts = [["engines"], ["engines", "portable"], ["engines", "checkpoint"], ["engines", "portable", "checkpoint"]]
    plans = [plan_of(release={"name": "tiny", "version": "1", "include": include}) for include in parts]
    assert len({plan.build_key for plan in plans}) == len(parts)
    assert len({frozenset(step.digest for step in plan.of_kind(Kind.BUILD)) for plan in plans}) == 1


TENSORRT = {"backend": "tensorrt", "max_input_len": 16, "max_seq_len": 64}


def cluster(kind: str, **pools: PoolSpec) -> ClusterSpec:
    return ClusterSpec.model_validate({"kind": kind, "store": "s3://bucket", "pools": pools})


def test_unplaceable_kind_that_no_pool_runs_is_named() -> None:
    found = unplaceable(plan_of(), cluster("ray", cpu=PoolSpec(steps=("reference", "convert", "verify"))))
    assert found == ["build/rank0: no pool runs build steps"]


def test_unplaceable_steps_of_the_same_reason_are_told_together() -> None:
    pool = PoolSpec(steps=("reference", "convert", "verify"))
    found = unplaceable(plan_of(topology={"tp": 2, "pp": 2}), cluster("ray", cpu=pool))
    assert found == ["build/rank0 and 3 more: no pool runs build steps"]


@pytest.mark.parametrize(
    "kind",
    [
        "ray",
        "local",
    ],
)  # fmt: skip
def test_unplaceable_engine_without_a_gpu_pool_is_named(kind: str) -> None:
    found = unplaceable(plan_of(engine=TENSORRT), cluster(kind, default=PoolSpec()))
    assert found == ["build/rank0: needs 1 GPU, its pool has too few"]


def test_unplaceable_gpu_of_a_pool_that_the_step_never_reaches_does_not_count() -> None:
    places = cluster("ray", cpu=PoolSpec(labels={"kind": "cpu"}), gpu=PoolSpec(gpus=1, steps=("build",)))
    assert unplaceable(plan_of(engine=TENSORRT), places) == ["build/rank0: needs 1 GPU, its pool has too few"]


def test_unplaceable_pools_that_hold_everything_name_nothing() -> None:
    gpu = PoolSpec(gpus=1, steps=("build",))
    cpu = PoolSpec(steps=("reference", "calibrate", "convert", "verify"))
    for kind in ("ray", "local"):
        assert unplaceable(plan_of(engine=TENSORRT), cluster(kind, gpu=gpu, cpu=cpu)) == []
        assert unplaceable(plan_of(), cluster(kind, default=PoolSpec())) == []


def test_unplaceable_step_larger_than_its_pools_memory_is_named() -> None:
    found = unplaceable(plan_of(), cluster("local", default=PoolSpec(memory=10**6)))
    for name in ("reference", "build/rank0"):
        line = next(line for line in found if name in line)
        assert ": needs about " in line
        assert line.endswith("its pool has 1,000,000")


def test_make_plan_device_of_the_verification_reserves_a_gpu_and_is_no_identity() -> None:
    plans = {device: plan_of(verification={"device": device}) for device in ("auto", "cpu", "cuda")}
    assert len({made.build_key for made in plans.values()}) == 1
    reserved = {device: {step.kind for step in made.steps if step.resources.gpus} for device, made in plans.items()}
    assert reserved == {"auto": set(), "cpu": set(), "cuda": {Kind.REFERENCE, Kind.VERIFY}}


@pytest.mark.parametrize(
    ("device", "gpus_of_build", "gpus_of_proof", "reserved"),
    [
        ("auto", 0, 1, {Kind.REFERENCE, Kind.VERIFY}),
        ("auto", 1, 0, set()),
        ("auto", 8, 2, {Kind.REFERENCE, Kind.VERIFY}),
        ("cpu", 1, 1, set()),
        ("cuda", 0, 1, {Kind.REFERENCE, Kind.VERIFY}),
    ],
)
def test_with_offered_gpus_reserves_one_where_the_pool_of_the_proof_has_some(
    device: str, gpus_of_build: int, gpus_of_proof: int, reserved: set[Kind]
) -> None:
    made = plan_of(verification={"device": device})
    builders = PoolSpec(gpus=gpus_of_build, steps=("build", "convert"))
    places = cluster("ray", builders=builders, proof=PoolSpec(gpus=gpus_of_proof, steps=("reference", "verify")))
    placed = with_offered_gpus(made, places)
    assert {step.kind for step in placed.steps if step.resources.gpus} == reserved
    assert {step.resources.gpus for step in placed.steps} <= {0, 1}
    assert [step.digest for step in placed.steps] == [step.digest for step in made.steps]
    assert unplaceable(placed, places) == []
