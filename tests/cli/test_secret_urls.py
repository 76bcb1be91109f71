"""A URL with a password or a signature is refused by every command at every place, and never shown or written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.base.errors import OrchestratorError, SpecError
from orchestrator.base.urls import holds_secret
from orchestrator.cli.commands import app
from orchestrator.planning import preparation
from orchestrator.releases import pull, verify
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, StoreOptions
from orchestrator.spec.decoding import decode
from orchestrator.spec.loading import load_cluster, load_spec, resolve_source, resolve_store
from orchestrator.stores import open_store

SECRET = "wJalrXUtnFEMI"
URL = f"s3://AKIA:{SECRET}@bucket/engines/releases/llama/1"
FORMS = [
    URL,
    f"s3://AKIA:abc/{SECRET}@bucket/x",
    f"s3:/AKIA:{SECRET}@bucket/x",
    f"s3:AKIA:{SECRET}@bucket/x",
    f"S3://AKIA:{SECRET}@bucket",
    f"s3://AKIA:{SECRET}",
    f"s3://AKIA%3A{SECRET}%40bucket/x",
    f"s3://{SECRET}@bucket/x",
    f"simplecache::s3://AKIA:{SECRET}@bucket/x",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={SECRET}",
    f"https://user:{SECRET}@host/x",
    f"https://host/x#{SECRET}",
    f"az://container/x?sig={SECRET}",
    f"gs://user:{SECRET}@bucket/x",
    f"http://{SECRET}@host:8265",
    f"memory://user:{SECRET}@x",
    f"file://user:{SECRET}@host/x",
]


@pytest.mark.parametrize("url", FORMS)
def test_holds_secret_of_every_form_is_seen(url: str) -> None:
    assert holds_secret(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a/b@c:d", "s3://bucket/a:b@c", "hf://ORG/MODEL@main", "hf://MODEL@REV", "https://host:8265/a@b", "http://[::1]:80/x",
        "abfs://container@account.dfs.core.windows.net/x", "file:///a/b@c:d?e", "memory://x/y", "/a:b@c/d", "a:b@c", "C:/x@y", "",
        "s3://bucket/a%40b%3Fc", "gs://bucket/x", "registry:5000/image@sha256:ab",
    ],
)  # fmt: skip
def test_holds_secret_of_an_ordinary_place_is_not_seen(url: str) -> None:
    assert not holds_secret(url)


def _commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command by its words."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(app))]
    while pending:
        words, command = pending.pop()
        children = getattr(command, "commands", None)
        if children is None:
            yield words, command
        else:
            pending.extend(((*words, name), child) for name, child in children.items())


def _positions() -> Iterator[tuple[str, ...]]:
    """Command lines with the URL at every place that takes a value, and where none belongs."""
    for words, command in sorted(_commands(), key=lambda item: item[0]):
        values = [parameter for parameter in command.params if not getattr(parameter, "is_flag", False)]
        arguments = [parameter for parameter in values if parameter.param_type_name == "argument"]
        options = [parameter for parameter in values if parameter.param_type_name == "option"]
        for place in range(len(arguments) + 1):
            yield (*words, *["x"] * place, URL)
        for option in options:
            for name in option.opts:
                yield (*words, *["x"] * len(arguments), name, URL)
                yield (*words, *["x"] * len(arguments), f"{name}={URL}" if name.startswith("--") else f"{name}{URL}")
        yield (*words, "--no-such-option", URL)
        yield (*words, "--", URL)


POSITIONS = list(_positions())


def test_positions_are_those_of_every_command() -> None:
    assert len({words for words, _ in _commands()}) > 20
    assert {("build", "x", "--store", URL), ("pull", URL), ("k8s", "render", "x", "--store", URL)} <= set(POSITIONS)


def test_command_with_a_secret_at_any_place_refuses_it_and_shows_it_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("source: {path: m}\nrelease: {name: a, version: '1'}\n")
    command = typer.main.get_command(app)  # made once: that takes longer than a refusal
    monkeypatch.setattr("typer.testing._get_command", lambda _: command)
    for words, extra in zip(POSITIONS, itertools.cycle([(), ("--json",), ("-v",)]), strict=False):
        end = words.index("--") if "--" in words else len(words)
        done = CliRunner().invoke(app, [*words[:end], *extra, *words[end:]])
        assert done.exit_code == SpecError.exit_code, (words, done.output)
        assert SECRET not in done.output + done.stderr + repr(done.exception), words
        assert "environment, profile or role" in done.output + done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["x"]


@pytest.mark.parametrize("url", FORMS)
@pytest.mark.parametrize(
    "words", [["build", "x", "--store"], ["pull"], ["convert", "--output", "o", "--source"]], ids=lambda w: w[0]
)
def test_command_with_a_secret_in_any_form_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*words, url])
    assert done.exit_code == SpecError.exit_code
    assert SECRET not in done.output + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["source", "dataset", "scales", "quant_cfg"])
def test_plan_of_a_spec_with_a_secret_names_the_field_and_not_the_secret(tmp_path: Path, field: str) -> None:
    lines = {
        "source": f"source: {{path: '{URL}'}}",
        "dataset": f"source: {{path: m}}\nquantization: {{algorithm: FP8, calibration: {{dataset: '{URL}'}}}}",
        "scales": f"source: {{path: m}}\nquantization: {{algorithm: FP8, scales: '{URL}'}}",
        "quant_cfg": f"source: {{path: m}}\nquantization: {{algorithm: MIXED_PRECISION, quant_cfg: '{URL}'}}",
    }
    path = tmp_path / "spec.yaml"
    path.write_text(lines[field] + "\nrelease: {name: a, version: '1'}\n")
    done = CliRunner().invoke(app, ["plan", str(path)])
    assert done.exit_code == SpecError.exit_code
    assert SECRET not in done.output + done.stderr
    assert "holds a user, password or query" in " ".join((done.output + done.stderr).split())


@pytest.mark.parametrize("field", ["store", "address", "scratch"])
def test_cluster_file_with_a_secret_is_refused_without_it(tmp_path: Path, field: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("\n".join(f"{name}: '{URL if name == field else name}'" for name in ("store", "address", "scratch")))
    with pytest.raises(SpecError, match=rf"{field}\b.*holds a user, password or query") as caught:
        load_cluster(path)
    assert SECRET not in str(caught.value)


def test_functions_that_take_a_url_refuse_a_secret_without_showing_it(tmp_path: Path, make_spec: Any) -> None:
    spec = make_spec(tmp_path)
    calls = [
        lambda: ClusterSpec(store=URL),
        lambda: StoreOptions(endpoint_url=URL),
        lambda: decode(ClusterSpec, {"store": URL}, "here"),
        lambda: BuildSpec.model_validate({**spec.model_dump(), "source": {"path": URL}}),
        lambda: resolve_store(URL, tmp_path),
        lambda: resolve_source(URL, tmp_path),
        lambda: open_store(URL),
        lambda: pull(URL, tmp_path / "out"),
        lambda: verify(URL),
        lambda: preparation.plan(spec.model_copy(update={"source": spec.source.model_copy(update={"path": URL})})),
        lambda: load_spec(tmp_path / "none.yaml"),
    ]
    for call in calls:
        with pytest.raises((OrchestratorError, ValueError)) as caught:
            call()
        errors = list(itertools.takewhile(lambda error: error, _chain(caught.value)))
        assert all(SECRET not in str(error) + repr(error) for error in errors)


def _chain(error: BaseException | None) -> Iterator[BaseException | None]:
    while True:
        yield error
        error = error and (error.__cause__ or error.__context__)


def test_no_command_shows_local_variables_in_tracebacks() -> None:
    from orchestrator.cli import commands

    assert commands.app.pretty_exceptions_enable is False
