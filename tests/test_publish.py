"""Publishing: what the manifest says, that it says no secrets, and two builds at once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cache, verbs
from orchestrator.core.errors import OrchestratorError, ReleaseExistsError
from orchestrator.core.manifest import MANIFEST, Manifest
from orchestrator.core.spec import BuildSpec, ClusterSpec
from orchestrator.core.step import Kind, Outcome
from orchestrator.releases import list_releases, verify
from orchestrator.stores import open_store
from orchestrator.work import publish as publishing
from orchestrator.work.describing import describe
from tests.models.releases import make_keys, pretend_to_run, publish_tiny, release_spec, tiny_source

ROUNDS = 20


def test_manifest_of_a_build_says_what_an_engines_user_needs(tmp_path: Path) -> None:
    manifest = publish_tiny(tmp_path).manifest
    assert [(r.rank, r.pp_rank, r.tp_rank, r.cp_rank, r.ep_rank) for r in manifest.ranks] == [
        (0, 0, 0, 0, 0), (1, 0, 1, 0, 0), (2, 1, 0, 0, 0), (3, 1, 1, 0, 0),
    ]  # fmt: skip
    assert manifest.selectors.model_dump() == {
        "backend": "tensorrt_rtx", "precision": manifest.model.dtype, "tp": 2, "pp": 2, "gpu": "8.9",
    }  # fmt: skip
    assert all(len(file.chunks.sha256) == 1 and file.chunks.sha256[0] == file.sha256 for file in manifest.all_files())
    dependencies = {item.name: item for item in manifest.provenance.buildDefinition.resolvedDependencies}
    assert {"source", "tokenizer.json", "tensorrt_rtx"} <= dependencies.keys()
    tokenizer = next(file for file in manifest.shared if file.path == "tokenizer/tokenizer.json")
    assert dependencies["tokenizer.json"].digest == {"sha256": tokenizer.sha256}


def test_describe_quantized_build_names_scales_and_worst_linears(tmp_path: Path) -> None:
    spec = release_spec(tiny_source(tmp_path / "source"), quantization={"algorithm": "FP8"})
    plan = verbs.plan(spec)
    outcomes = pretend_to_run(plan, open_store((tmp_path / "store").as_uri()))
    errors = {f"transformer.layers.{layer}.mlp.fc": layer / 100 for layer in range(30)}
    convert = next(plan.of_kind(Kind.CONVERT)).digest
    outcomes[convert] = outcomes[convert].model_copy(update={"facts": {"quantization_errors": errors}})
    published = publish_tiny(tmp_path, quantization={"algorithm": "FP8"}).manifest
    found = describe(plan, outcomes, published.ranks, published.shared).quantization
    assert found is not None
    assert found.model["algorithm"] == "FP8"
    calibrated = [outcomes[step.digest].outputs[0].sha256 for step in plan.of_kind(Kind.CALIBRATE)]
    assert [artifact.sha256 for artifact in found.calibration] == calibrated
    assert calibrated
    assert next(iter(found.worst_errors)) == "transformer.layers.29.mlp.fc"
    assert len(found.worst_errors) == 10


def test_manifest_and_signature_hold_no_secret_and_no_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "planted-token")
    private, _ = make_keys(tmp_path / "keys")
    published = publish_tiny(tmp_path, private)
    written = [info.key for info in published.store.list("releases/") if info.key.endswith((MANIFEST, ".sig"))]
    assert len(written) == 2
    key = private.read_text().splitlines()[1]
    for data in (published.store.get(name) for name in written):
        for secret in ("planted-secret", "planted-token", key, str(tmp_path), "a log may hold anything"):
            assert secret.encode() not in data


def test_describe_source_with_credentials_in_its_url_shows_none(tmp_path: Path) -> None:
    published = publish_tiny(tmp_path)
    plan, url = published.plan, "s3://AKIA:planted@bucket/models/tiny?X-Amz-Signature=planted"
    spec = plan.spec.model_copy(update={"source": plan.spec.source.model_copy(update={"path": url})})
    inputs = type(plan.inputs)(**{**vars(plan.inputs), "source": url})
    changed = type(plan)(spec, inputs, plan.steps)
    outcomes = cache.committed(published.store, (step.digest for step in plan.steps))
    data = describe(changed, outcomes, published.manifest.ranks, published.manifest.shared).to_json()
    assert b"s3://bucket/models/tiny" in data
    assert b"planted" not in data


def _race(specs: list[BuildSpec], store: str, key: Path | None) -> tuple[list[Manifest], list[OrchestratorError]]:
    done: list[Manifest] = []
    failed: list[OrchestratorError] = []
    barrier = threading.Barrier(len(specs))

    def run(spec: BuildSpec) -> None:
        barrier.wait()
        try:
            done.append(verbs.build(spec, ClusterSpec(store=store), sign_key=key).manifest)
        except OrchestratorError as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done, failed


def _intact(store: str, outcomes: dict[str, Outcome], public: Path | None) -> None:
    opened = open_store(store)
    assert cache.committed(opened, outcomes).keys() == outcomes.keys()
    assert list(opened.list(cache.LIVE)) == []
    for item in list_releases(store):
        verify(f"{store}/{item.folder}", public)


@pytest.mark.parametrize("is_same", [False, True], ids=["different", "same"])
def test_build_two_at_once_publish_one_manifest_and_harm_nothing(
    tmp_path: Path, is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=60)

    def describe_together(*arguments: Any) -> Manifest:
        together.wait()  # both have found the version free and copied their objects
        return describe(*arguments)

    monkeypatch.setattr(publishing, "describe", describe_together)
    source = tiny_source(tmp_path / "source")
    engines = [{"max_batch_size": size, "max_input_len": 16, "max_seq_len": 64} for size in ((2, 2) if is_same else (2, 3))]
    private, public = make_keys(tmp_path / "keys")
    store = (tmp_path / "store").as_uri()
    outcomes: dict[str, Outcome] = {}
    for number in range(ROUNDS):
        release = {"name": "tiny", "version": str(number)}
        specs = [release_spec(source, engine=engine, release=release, topology={"tp": 1}) for engine in engines]
        if not number:
            for spec in specs:
                outcomes |= pretend_to_run(verbs.plan(spec), open_store(store))
        done, failed = _race(specs, store, private)
        if is_same:
            assert failed == []
            assert done[0] == done[1]
        else:
            assert [(type(error), error.exit_code) for error in failed] == [(ReleaseExistsError, 18)]
            assert len(done) == 1
    assert len(list_releases(store)) == ROUNDS
    _intact(store, outcomes, public)
