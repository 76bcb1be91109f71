"""Models of the Hugging Face hub as sources: read by ranges, at one commit, from a hub on a port of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from orchestrator import stages
from orchestrator.base.errors import OrchestratorError, SourceMissingError, SourceUnreadableError, SpecError
from orchestrator.checkpoints import read_source
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind
from orchestrator.spec.loading import load_spec
from orchestrator.stores.hub import HubStore
from orchestrator.stores.remote import RemoteFolder
from orchestrator.stores.retrying import Backoff
from tests.support.fake_hub import FakeHub, run_hub
from tests.support.synthetic import build_spec, model_config, random_arrays, write_source

ONE, TWO = "1" * 40, "2" * 40
CONFIG = model_config(hidden_size=64, intermediate_size=128, head_size=16, vocab_size=256)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with run_hub() as hub:
        for commit, seed in ((ONE, 1), (TWO, 2)):
            hub.folders[commit] = write_source(tmp_path / commit, CONFIG, random_arrays(CONFIG, seed=seed), num_files=2)
        hub.branches["main"] = ONE
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield hub


def test_plan_of_a_model_of_the_hub_reads_headers_and_is_that_of_its_commit(hub: FakeHub) -> None:
    made = preparation.plan(build_spec("hf://acme/tiny"))
    assert made.inputs.source == f"hf://acme/tiny@{ONE}"
    assert {file.identity.partition(":")[0] for file in made.inputs.index.files} == {"sha256"}
    assert not any("model.norm" in path for _, path, _ in hub.requests)
    local = preparation.plan(build_spec(hub.folders[ONE]))
    assert made.inputs.index.tensors == local.inputs.index.tensors


def test_plan_of_a_branch_that_has_moved_is_another_build(hub: FakeHub) -> None:
    before = preparation.plan(build_spec("hf://acme/tiny@main"))
    hub.branches["main"] = TWO
    after = preparation.plan(build_spec("hf://acme/tiny@main"))
    assert before.build_key != after.build_key
    assert preparation.plan(build_spec(f"hf://acme/tiny@{ONE}")).build_key == before.build_key


def test_convert_from_the_hub_equals_convert_from_the_folder_and_fetches_each_byte_once(hub: FakeHub, tmp_path: Path) -> None:
    stages.convert(build_spec(hub.folders[ONE]), tmp_path / "local")
    made = stages.convert(build_spec("hf://acme/tiny"), tmp_path / "remote")
    for path in sorted((tmp_path / "local").iterdir()):
        assert (tmp_path / "remote" / path.name).read_bytes() == path.read_bytes(), path.name
    assert any(step.kind is Kind.CONVERT for step in made.plan.steps)
    assert all(wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(".safetensors"))
    total = sum(path.stat().st_size for path in hub.folders[ONE].iterdir())
    assert hub.fetched < 3 * total  # small files are their headers' first read


@pytest.mark.parametrize(
    ("url", "refusal", "error", "words", "advice"),
    [
        ("hf://acme/tiny", (403, "GatedRepo"), SourceUnreadableError, "is gated", "HF_TOKEN"),
        ("hf://acme/tiny", (401, "GatedRepo"), SourceUnreadableError, "is gated", "hf auth login"),
        ("hf://acme/tiny", (401, ""), OrchestratorError, "acme/tiny", "HF_TOKEN"),
        ("hf://acme/tiny", (403, ""), SourceUnreadableError, "the hub refuses acme/tiny: 403", "HF_TOKEN"),
        ("hf://acme/other", None, SourceMissingError, "the hub has no model acme/other", "hf auth login"),
        ("hf://acme/tiny@v9", None, SourceMissingError, "has no revision 'v9'", "a branch, a tag or a commit"),
        ("hf://tiny", None, SpecError, "is no model of the hub", "hf://ORG/MODEL"),
        ("hf://acme/tiny/config.json", None, SpecError, "is no model of the hub", "hf://ORG/MODEL"),
    ],
)
def test_plan_of_what_the_hub_does_not_give_says_why(
    hub: FakeHub, url: str, refusal: tuple[int, str] | None, error: type[OrchestratorError], words: str, advice: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(error) as caught:
        preparation.plan(build_spec(url))
    assert words in caught.value.message
    assert advice in caught.value.advice
    assert len(hub.requests) <= 2


def test_plan_without_a_network_says_how_to_get_the_model(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnreadableError) as caught:
        preparation.plan(build_spec("hf://acme/tiny"))
    assert "offline" in caught.value.message
    assert "hf download acme/tiny --local-dir" in caught.value.advice


def test_plan_of_a_hub_that_does_not_answer_says_so_after_some_tries(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    delays: list[float] = []
    place = RemoteFolder(HubStore("hf://acme/tiny", backoff=Backoff(sleep=delays.append)))
    with pytest.raises(SourceUnreadableError, match="cannot look at it") as caught:
        place.names()
    assert "hf download acme/tiny" in caught.value.advice
    assert len(delays) > 2


@pytest.mark.parametrize(
    ("name", "words", "advice"),
    [
        ("adapter_config.json", "is an adapter", "merge_and_unload"),
        ("model_index.json", "is a diffusers pipeline", "language models"),
        ("model.Q8_0.gguf", "is a GGUF model", "Hugging Face checkpoint"),
        ("notes.txt", "holds no checkpoint of a known format: it holds notes.txt", "Formats: "),
        (None, "it holds no file", "Formats: "),
    ],
)
def test_plan_of_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path, name: str | None, words: str, advice: str) -> None:
    if name is not None:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SourceMissingError, match=words) as caught:
        read_source(str(tmp_path))
    assert advice in caught.value.advice


def test_plan_of_a_hub_name_without_a_folder_says_how_to_get_the_model(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("source: {path: meta-llama/Llama-3.1-8B}\nrelease: {name: a, version: '1'}\n")
    with pytest.raises(SourceMissingError) as caught:
        preparation.plan(load_spec(tmp_path / "spec.yaml"))
    assert "hf download meta-llama/Llama-3.1-8B --local-dir" in caught.value.advice
    assert "hf://meta-llama/Llama-3.1-8B" in caught.value.advice
