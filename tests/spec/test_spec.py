from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from orchestrator.base.errors import SpecError
from orchestrator.model.topology import Topology
from orchestrator.spec.build import BuildConfig, BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode
from orchestrator.spec.values import parse_bytes

PLAIN: dict[str, Any] = {"source": {"path": "model"}, "release": {"name": "tiny", "version": "1.0"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("16 GiB", 16 * 2**30),
        ("1.5KB", 1500),
        ("7", 7),
        ("7B", 7),
        ("3k", 3000),
        (" 2 mib ", 2 * 2**20),
        ("1TiB", 2**40),
        (12, 12),
        (None, None),
    ],
)
def test_parse_bytes_size_is_number_of_bytes(text: Any, expected: Any) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 PB", "1e3", "5 GB/s", "1,5GB", "five"])
def test_parse_bytes_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_decode_minimal_spec_has_defaults() -> None:
    spec = decode(BuildSpec, PLAIN, "spec.yaml")
    assert spec.topology.topology() == Topology(1, 1, None)
    assert spec.dtype == "auto"
    assert spec.verification.enabled
    assert spec.conversion.max_shard_bytes == 5_000_000_000


def test_decode_sizes_with_units_become_bytes() -> None:
    spec = decode(BuildSpec, {**PLAIN, "conversion": {"max_shard_bytes": "2 GiB"}}, "spec.yaml")
    assert spec.conversion.max_shard_bytes == 2 * 2**30


def test_decode_spec_is_immutable() -> None:
    spec = decode(BuildSpec, PLAIN, "spec.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        spec.dtype = "float16"


def _message(model: type[Any], data: Any) -> str:
    with pytest.raises(SpecError) as caught:
        decode(model, data, "spec.yaml")
    assert caught.value.exit_code == 10
    assert caught.value.message.startswith("spec.yaml: ")
    return caught.value.message


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"topolgy": {"tp": 2}}, "unknown key topolgy (did you mean topology?)"),
        ({"topology": {"tpp": 2}}, "unknown key topology.tpp (did you mean tp?)"),
        ({"verification": {"tolerance": {"max_kl": 1}}}, "unknown key verification.tolerance.max_kl (did you mean max_mean_kl?)"),
        ({"quantization": {"algoritm": "FP8"}}, "unknown key quantization.algoritm (did you mean algorithm?)"),
        ({"engine": {"zzzz": 1}}, "unknown key engine.zzzz"),
    ],
)  # fmt: skip
def test_decode_unknown_key_is_named_with_its_path(section: dict[str, Any], expected: str) -> None:
    parts = _message(BuildSpec, {**PLAIN, **section}).removeprefix("spec.yaml: ").split("; ")
    assert expected in parts


def test_decode_unknown_key_of_a_pool_is_named_with_its_path() -> None:
    message = _message(ClusterSpec, {"store": "s3://bucket", "pools": {"gpu": {"stepz": ["build"]}}})
    assert "unknown key pools.gpu.stepz" in message


def test_decode_missing_key_is_named() -> None:
    assert "missing key source.path" in _message(BuildSpec, {**PLAIN, "source": {}})


def test_decode_several_mistakes_are_all_named() -> None:
    message = _message(BuildSpec, {"source": {"path": 5}, "topology": {"tp": 0}, "relase": {}})
    for path in ("source.path", "topology.tp", "unknown key relase", "missing key release"):
        assert path in message


@pytest.mark.parametrize("data", [None, [], "tp: 2", 3])
def test_decode_no_mapping_is_refused(data: Any) -> None:
    assert "expected a mapping" in _message(BuildSpec, data)


def test_decode_an_empty_file_says_that_there_is_nothing() -> None:
    assert "expected a mapping of fields, got nothing" in _message(ClusterSpec, None)


def test_decode_unknown_word_is_told_with_the_known_ones() -> None:
    message = _message(ClusterSpec, {"store": "s3://b", "pools": {"gpu": {"steps": ["bild"]}}})
    kinds = "'miniature', 'reference', 'calibrate', 'convert', 'build', 'verify' or 'export'"
    assert f"pools.gpu.steps.0: Input should be {kinds}, not 'bild'" in message


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"engine": {"opt_batch_size": 9}}, "opt_batch_size is greater than max_batch_size"),
        ({"engine": {"max_input_len": 8, "opt_input_len": 9}}, "opt_input_len is greater than max_input_len"),
        ({"engine": {"max_input_len": 64, "max_seq_len": 32}}, "max_seq_len is smaller than max_input_len"),
        ({"engine": {"max_input_len": 8, "max_logits_per_sequence": 9}}, "max_logits_per_sequence is greater"),
        ({"engine": {"backend": "tensorrt", "compute_capabilities": ["8.9"]}}, "compute_capabilities need backend tensorrt_rtx"),
        ({"engine": {"for_triton": True}}, "for_triton needs backend tensorrt"),
        ({"engine": {"refit": True}}, "refit needs backend tensorrt: without a GPU, TensorRT-RTX compiles no refittable weights"),
        ({"engine": {"version_compatible": True}}, "version_compatible needs backend tensorrt: TensorRT-RTX has no lean runtime"),
        ({"verification": {"max_tokens": 4, "decode_steps": 4}}, "decode_steps must be smaller than max_tokens"),
        ({"topology": {"pp": 0}}, "topology.pp"),
        ({"dtype": "int8"}, "dtype"),
        ({"conversion": {"max_shard_bytes": "0"}}, "conversion.max_shard_bytes"),
        ({"conversion": {"max_shard_bytes": "big"}}, "'big' is not a size"),
        ({"release": {"name": "Upper", "version": "1"}}, "release.name"),
        ({"release": {"name": "a", "version": "../1"}}, "release.version"),
    ],
)
def test_decode_impossible_value_is_refused_with_the_reason(section: dict[str, Any], reason: str) -> None:
    assert reason in _message(BuildSpec, {**PLAIN, **section})


def test_decode_release_name_cannot_leave_its_folder() -> None:
    for name in ("..", ".hidden", "a/b", "a" * 129, ""):
        _message(BuildSpec, {**PLAIN, "release": {"name": name, "version": "1"}})


def test_decode_cluster_without_pools_has_one_for_every_kind_of_step() -> None:
    spec = decode(ClusterSpec, {"store": "file:///tmp/store"}, "cluster.yaml")
    assert set(spec.pools["default"].steps) == {"miniature", "reference", "calibrate", "convert", "build", "verify", "export"}


@pytest.mark.parametrize(
    ("pools", "name"),
    [
        ({"gpu": ["calibrate", "build"], "cpu": ["reference", "convert", "verify"]}, "cpu"),
        ({"a": ["convert"], "b": ["reference"], "c": ["build", "verify"]}, "c"),
        ({"gpu": ["build"], "cpu": ["convert"]}, "cpu"),
        ({"gpu": ["build", "verify"], "cpu": ["convert", "miniature"]}, "cpu"),
        ({"gpu": ["calibrate"]}, None),
    ],
)
def test_pool_name_for_a_miniature_that_no_pool_lists_is_that_of_verify_or_the_next_best(
    pools: dict[str, list[str]], name: str | None
) -> None:
    plain = {"store": "file:///tmp/store", "pools": {pool: {"steps": steps} for pool, steps in pools.items()}}
    assert decode(ClusterSpec, plain, "cluster.yaml").pool_name_for("miniature") == name


def test_decode_cluster_with_empty_pools_is_refused() -> None:
    assert "pools" in _message(ClusterSpec, {"store": "file:///tmp/store", "pools": {}})


def test_decode_result_survives_json() -> None:
    spec: BaseModel = decode(BuildSpec, {**PLAIN, "topology": {"tp": 2, "pp": 2, "pp_partition": [1, 2]}}, "spec.yaml")
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_cluster_of_absurdly_many_nodes_is_refused() -> None:
    with pytest.raises(SpecError, match=r"pools\.a\.nodes.*less than or equal to 100000"):
        decode(ClusterSpec, {"store": "file:///s", "pools": {"a": {"nodes": 10**9}}}, "cluster.yaml")


def test_engine_options_that_came_later_are_in_no_digest_until_they_are_set() -> None:
    options = ("for_triton", "version_compatible")
    assert not BuildConfig().model_dump(mode="json").keys() & set(options)
    for option in options:
        asked = BuildConfig.model_validate({"backend": "tensorrt", option: True}).model_dump(mode="json")
        assert asked[option] is True
        assert getattr(BuildConfig.model_validate(asked), option) is True
