"""Layouts: what TensorRT-LLM and an OCI registry find in a pulled folder. Triton has test_triton.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import DigestError, SpecError
from orchestrator.model.config_trtllm import from_trtllm
from orchestrator.releases import pull
from orchestrator.releases.layouts import Request, arrange
from tests.support.releases import Published, files_below, make_keys, publish_tiny


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("layouts")
    return publish_tiny(folder, make_keys(folder / "keys")[0])


def test_trtllm_layout_is_an_engine_directory(published: Published, tmp_path: Path) -> None:
    pull(published.url, tmp_path, layout="trtllm", check=False)
    found = files_below(tmp_path)
    assert {f"rank{rank}.engine" for rank in range(4)} <= found.keys()
    config = json.loads(found["config.json"])
    assert set(config) == {"version", "pretrained_config", "build_config"}
    model, topology = from_trtllm(config["pretrained_config"])
    assert (model.architecture, topology.tp, topology.pp) == (published.manifest.model.architecture, 2, 2)
    assert (config["build_config"]["max_batch_size"], config["build_config"]["max_seq_len"]) == (2, 64)


def test_oci_layout_holds_every_blob_that_its_index_reaches(published: Published, tmp_path: Path) -> None:
    pull(published.url, tmp_path, layout="oci", check=False)
    assert json.loads((tmp_path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}

    def blob(descriptor: dict[str, object]) -> bytes:
        data = (tmp_path / "blobs" / str(descriptor["digest"]).replace(":", "/")).read_bytes()
        assert (f"sha256:{digest_bytes(data)}", len(data)) == (descriptor["digest"], descriptor["size"])
        return data

    (entry,) = json.loads((tmp_path / "index.json").read_text())["manifests"]
    manifest = json.loads(blob(entry))
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    config = json.loads(blob(manifest["config"]))
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    paths = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in manifest["layers"]}
    assert paths.keys() == {file.path for file in published.manifest.all_files()} | {"manifest.json", "model.sig"}
    assert paths["rank2.engine"]["mediaType"] == "application/vnd.cncf.model.weight.v1.raw"
    reached = {digest_bytes(blob(item)) for item in [entry, manifest["config"], *manifest["layers"]]}
    assert reached == {path.name for path in (tmp_path / "blobs" / "sha256").iterdir()}


def test_layout_that_is_not_there_is_refused_before_any_byte(published: Published, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no layout 'zip'") as caught:
        pull(published.url, tmp_path / "out", layout="zip", check=False)
    assert "checkpoint, flat, genai, oci, triton, trtllm" in caught.value.advice
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [{}, {"max_batch_size": "x"}, {"max_batch_size": 1, "opt_batch_size": 1, "max_input_len": []}])
def test_trtllm_layout_of_a_manifest_without_what_it_needs_is_refused(published: Published, asked: dict[str, object]) -> None:
    manifest = published.manifest.model_copy(update={"engine_config": asked})
    request = Request(manifest, (0,), tuple(manifest.ranks[0].files), manifest.to_json(), None)
    with pytest.raises(DigestError, match="engine_config cannot be read"):
        arrange("trtllm", request)
