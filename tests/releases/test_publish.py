"""Publishing: what the manifest says, and that it says no secrets. Two builds at once: tests/integration/test_race.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.base.errors import VerificationError
from orchestrator.planning import preparation
from orchestrator.planning.facts import ConvertFacts, Facts
from orchestrator.planning.steps import Kind
from orchestrator.releases.describe import describe
from orchestrator.releases.manifest import MANIFEST
from orchestrator.releases.placing import place
from orchestrator.releases.publish import publish
from orchestrator.scheduling import commits
from orchestrator.stores import open_store
from tests.support.releases import make_keys, pretend_to_run, publish_tiny, release_spec, tiny_source


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


def test_build_without_a_proven_miniature_is_not_published(tmp_path: Path) -> None:
    plan = preparation.plan(release_spec(tiny_source(tmp_path / "source")))
    store = open_store((tmp_path / "store").as_uri())
    outcomes = pretend_to_run(plan, store)
    (step,) = plan.of_kind(Kind.MINIATURE)
    unproven = {**outcomes, step.digest: outcomes[step.digest].model_copy(update={"facts": Facts()})}
    missing = {digest: outcome for digest, outcome in outcomes.items() if digest != step.digest}
    for found in (unproven, missing):
        with pytest.raises(VerificationError, match="the build's miniature has no outcome"):
            place(store, plan, found)
    assert not list(store.list("releases/"))
    assert publish(store, plan, outcomes, place(store, plan, outcomes)).miniature is not None


def test_describe_quantized_build_names_scales_and_worst_linears(tmp_path: Path) -> None:
    spec = release_spec(tiny_source(tmp_path / "source"), quantization={"algorithm": "FP8"})
    plan = preparation.plan(spec)
    outcomes = pretend_to_run(plan, open_store((tmp_path / "store").as_uri()))
    errors = {f"transformer.layers.{layer}.mlp.fc": layer / 100 for layer in range(30)}
    convert = next(plan.of_kind(Kind.CONVERT)).digest
    outcomes[convert] = outcomes[convert].model_copy(update={"facts": ConvertFacts(quantization_errors=errors)})
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
    outcomes = commits.committed(published.store, (step.digest for step in plan.steps))
    data = describe(changed, outcomes, published.manifest.ranks, published.manifest.shared).to_json()
    assert b"s3://bucket/models/tiny" in data
    assert b"planted" not in data
