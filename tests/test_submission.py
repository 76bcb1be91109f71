"""What travels to a cluster: files that decode to the same build, and an id that finds it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.core.spec import BuildSpec, ClusterSpec
from orchestrator.loading import load_cluster, load_spec
from orchestrator.submission import ENTRYPOINT, bundle, submission_id


@pytest.fixture
def spec() -> BuildSpec:
    return BuildSpec.model_validate(
        {"source": {"path": "/models/llama"}, "topology": {"tp": 2}, "release": {"name": "llama_3.1", "version": "1"}}
    )


def test_bundle_read_back_gives_the_same_build(spec: BuildSpec, tmp_path: Path) -> None:
    place = ClusterSpec(kind="ray", store="s3://bucket/builds")
    for name, text in bundle(spec, place).items():
        (tmp_path / name).write_text(text)
    assert load_spec(tmp_path / "spec.yaml") == spec
    assert load_cluster(tmp_path / "cluster.yaml") == place


def test_entrypoint_names_the_files_of_the_bundle(spec: BuildSpec) -> None:
    files = bundle(spec, ClusterSpec(store="s3://bucket"))
    assert [word for word in ENTRYPOINT.split() if word.endswith(".yaml")] == list(files)


def test_submission_id_of_the_same_build_is_the_same(spec: BuildSpec) -> None:
    first = submission_id(spec, ClusterSpec(store="s3://bucket"))
    assert first == submission_id(spec, ClusterSpec(store="s3://bucket", threads_per_step=4))
    assert first.startswith("build-llama-3-1-")


def test_submission_id_of_another_store_or_spec_differs(spec: BuildSpec) -> None:
    other = spec.model_copy(update={"dtype": "float16"})
    ids = {
        submission_id(spec, ClusterSpec(store="s3://a")),
        submission_id(spec, ClusterSpec(store="s3://b")),
        submission_id(other, ClusterSpec(store="s3://a")),
    }
    assert len(ids) == 3
