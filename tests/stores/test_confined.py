"""Tokenizer and config files are published: none is read from outside of the source."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.base.errors import SourceLinkError
from orchestrator.checkpoints import companions, read_source
from orchestrator.cli.commands import app
from orchestrator.planning import preparation
from orchestrator.releases.placing import place
from orchestrator.releases.publish import publish
from orchestrator.scheduling import commits
from orchestrator.stores import open_store
from orchestrator.stores.source import LocalFolder
from tests.support.releases import pretend_to_run, release_spec, tiny_source


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret" / "id.json"
    path.parent.mkdir()
    path.write_text('{"private": "key"}')
    return path


@pytest.mark.parametrize("way", ["absolute", "relative", "by a folder", "by another link"])
def test_plan_of_a_source_whose_tokenizer_links_outside_is_refused(tmp_path: Path, secret: Path, way: str) -> None:
    source = tiny_source(tmp_path / "source")
    link = source / "tokenizer.json"
    link.unlink()
    if way == "absolute":
        link.symlink_to(secret)
    elif way == "relative":
        link.symlink_to("../secret/id.json")
    elif way == "by a folder":
        (source / "sub").symlink_to(secret.parent)
        link.symlink_to("sub/id.json")
    else:
        (source / "other.json").symlink_to(secret)
        link.symlink_to("other.json")
    with pytest.raises(SourceLinkError, match="link out of the source"):
        preparation.plan(release_spec(source))


def test_plan_command_of_such_a_source_ends_with_its_own_code(tmp_path: Path, secret: Path) -> None:
    source = tiny_source(tmp_path / "source")
    (source / "vocab.json").symlink_to(secret)
    spec = tmp_path / "spec.yaml"
    engine = "engine: {max_input_len: 16, max_seq_len: 64}"
    spec.write_text(f"source: {{path: {source}}}\n{engine}\nrelease: {{name: a, version: '1'}}\n")
    done = CliRunner().invoke(app, ["plan", str(spec)])
    assert done.exit_code == SourceLinkError.exit_code
    assert "private" not in done.output + done.stderr


def test_publish_of_a_file_that_became_a_link_outside_is_refused(tmp_path: Path, secret: Path) -> None:
    source = tiny_source(tmp_path / "source")
    store = open_store((tmp_path / "store").as_uri())
    spec = release_spec(source)
    plan = preparation.plan(spec)
    pretend_to_run(plan, store)
    outcomes = commits.committed(store, (step.digest for step in plan.steps))
    engines = place(store, plan, outcomes)
    secret.write_bytes((source / "tokenizer.json").read_bytes())  # even with the same content: it may change
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(secret)
    with pytest.raises(SourceLinkError):
        publish(store, plan, outcomes, engines)
    assert store.size("releases/tiny/1/manifest.json") is None


def test_companions_of_a_hub_cache_are_read_through_its_links(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "plain")
    repository = tmp_path / "models--org--tiny"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        (repository / "blobs" / name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    assert [file.name for file in read_source(str(snapshot))[1]] == ["config.json", "tokenizer.json"]
    (tmp_path / "model").symlink_to(snapshot)
    assert [file.name for file in read_source(str(tmp_path / "model"))[1]] == ["config.json", "tokenizer.json"]


def test_companions_of_a_hub_cache_that_leave_its_blobs_are_refused(tmp_path: Path, secret: Path) -> None:
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot / "tokenizer.json").symlink_to(secret)
    with pytest.raises(SourceLinkError):
        companions(LocalFolder(snapshot), ["tokenizer.json"])


def test_companions_linked_within_the_source_are_read(tmp_path: Path) -> None:
    source = tiny_source(tmp_path / "source")
    (source / "tokenizer.json").rename(source / "real.json")
    (source / "tokenizer.json").symlink_to("real.json")
    assert preparation.plan(release_spec(source)).inputs.extra_files[1].name == "tokenizer.json"
