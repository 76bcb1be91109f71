"""Whole builds of a tiny model on this machine's processes, with real engines. A killed one that resumes: test_demo.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import building
from orchestrator.base.digest import digest_file
from orchestrator.base.errors import DigestError, ReleaseExistsError, ReleaseMissingError, VerificationError
from orchestrator.planning.steps import Kind
from orchestrator.releases import pull
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from tests.conftest import SpecMaker
from tests.support.wrappers import write_wrapper

ENGINE = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}


def build(spec: BuildSpec, store: str) -> building.Build:
    return building.build(spec, ClusterSpec(store=store))


def ran(done: building.Build) -> list[str]:
    return sorted(done.plan.step(digest).name for digest in done.result.ran) if done.result else []


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> building.Build:
    """tp=2, pp=2 of the tiny Llama, built once for the tests that only read it."""
    spec = BuildSpec.model_validate(
        {
            "source": {"path": str(tiny_llama)}, "topology": {"tp": 2, "pp": 2}, "engine": ENGINE,
            "verification": {"max_tokens": 12, "decode_steps": 3}, "release": {"name": "tiny", "version": "1"},
        }
    )  # fmt: skip
    return build(spec, tmp_path_factory.mktemp("published").as_uri())


def test_build_of_four_ranks_publishes_verified_engines(published: building.Build) -> None:
    manifest = published.manifest
    assert [(record.rank, record.tp_rank, record.pp_rank) for record in manifest.ranks] == [
        (0, 0, 0),
        (1, 1, 0),
        (2, 0, 1),
        (3, 1, 1),
    ]
    assert manifest.verification is not None
    assert manifest.verification.max_relative_error < 1e-3
    release = Path(published.address.removeprefix("file://"))
    for file in manifest.all_files():
        assert digest_file(release / file.key) == file.sha256
    first, last = manifest.ranks[0].engine, manifest.ranks[3].engine
    assert first.tensors[0].name == "input_ids"
    assert first.tensors[0].profiles["prefill"]["max"] == (2, 16)
    assert first.tensors[0].profiles["decode"]["max"] == (2, 1)
    logits = next(tensor for tensor in last.tensors if tensor.name == "logits")
    assert (logits.dtype, logits.shape[-1]) == ("float", 131)
    assert (last.cuda_version, last.gpu_name) == ("13", None)
    assert (last.context_bytes or 0) > 0
    assert (last.weights_bytes or 0) > 0
    memory = manifest.ranks[3].memory
    assert memory.kv_cache_bytes == 2 * 2 * (2 * 1 * 64 * 16) * 2  # layers, keys and values, [batch, head, slot, size], bfloat16
    assert memory.total_bytes > memory.engine_bytes + memory.kv_cache_bytes
    present = next(tensor for tensor in last.tensors if tensor.name == "present_key_values.0.key")
    assert present.aliases == "past_key_values.0.key"


def test_build_of_a_language_model_within_a_larger_model_publishes_whose_part_it_is(tmp_path: Path, make_spec: SpecMaker) -> None:
    write_wrapper("Qwen2_5_VLForConditionalGeneration", tmp_path / "model")
    done = build(make_spec(tmp_path / "model", engine=ENGINE), (tmp_path / "store").as_uri())
    manifest = done.manifest
    assert (manifest.part_of, manifest.model.architecture) == ("Qwen2_5_VLForConditionalGeneration", "Qwen2ForCausalLM")
    assert manifest.verification is not None
    assert manifest.verification.max_relative_error < 5e-5


def test_build_keeps_tensorrts_own_log_with_the_step(published: building.Build) -> None:
    assert published.result is not None
    store = Path(published.address.removeprefix("file://").partition("/releases/")[0])
    for step in published.plan.of_kind(Kind.BUILD):
        assert "[INFO]" in (store / published.result.outcomes[step.digest].log).read_text()


def test_build_a_second_time_runs_no_step(published: building.Build) -> None:
    store = published.address.partition("/releases/")[0]
    again = build(published.plan.spec, store)
    assert again.result is None
    assert again.manifest == published.manifest


def test_build_with_another_version_reuses_every_step(published: building.Build) -> None:
    store = published.address.partition("/releases/")[0]
    spec = published.plan.spec
    again = build(spec.model_copy(update={"release": spec.release.model_copy(update={"version": "2"})}), store)
    assert ran(again) == []
    assert again.address.endswith("/tiny/2")


def test_build_with_another_engine_option_rebuilds_engines_only(published: building.Build) -> None:
    store = published.address.partition("/releases/")[0]
    spec = published.plan.spec
    changed = {
        "engine": spec.engine.model_copy(update={"max_batch_size": 1}),
        "release": spec.release.model_copy(update={"version": "small"}),
    }
    assert ran(build(spec.model_copy(update=changed), store)) == ["build/rank0", "build/rank1", "build/rank2", "build/rank3"]


def test_build_under_a_published_version_is_refused(published: building.Build) -> None:
    store = published.address.partition("/releases/")[0]
    spec = published.plan.spec
    other = spec.model_copy(update={"engine": spec.engine.model_copy(update={"opt_batch_size": 2})})
    with pytest.raises(ReleaseExistsError, match="already published"):
        build(other, store)


def test_pull_of_a_rank_fetches_what_it_needs(published: building.Build, tmp_path: Path) -> None:
    paths = pull(published.address, tmp_path, ranks=[2], check=False)
    names = {path.relative_to(tmp_path).as_posix() for path in paths}
    assert "rank2.engine" in names
    assert "config.json" in names
    assert not names & {"rank0.engine", "rank1.engine", "rank3.engine"}
    record = published.manifest.ranks[2].files[0]
    assert digest_file(tmp_path / "rank2.engine") == record.sha256


def test_pull_of_a_damaged_engine_is_refused_and_leaves_nothing(published: building.Build, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "release"
    shutil.copytree(published.address.removeprefix("file://"), copy)
    engine = copy / published.manifest.ranks[1].files[0].key
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    with pytest.raises(DigestError):
        pull(copy.as_uri(), tmp_path / "out", ranks=[1], check=False)
    assert not (tmp_path / "out" / "rank1.engine").exists()


def test_pull_of_an_unknown_rank_is_refused(published: building.Build, tmp_path: Path) -> None:
    with pytest.raises(ReleaseMissingError, match="no rank 9"):
        pull(published.address, tmp_path, ranks=[9], check=False)


def test_build_above_tolerance_publishes_nothing(tiny_llama: Path, store_url: str, make_spec: SpecMaker) -> None:
    verification = {"max_tokens": 12, "decode_steps": 3, "tolerance": {"max_relative_error": 1e-12}}
    with pytest.raises(VerificationError, match="relative error"):
        build(make_spec(tiny_llama, verification=verification), store_url)
    assert not list(Path(store_url.removeprefix("file://")).glob("releases/**/manifest.json"))
