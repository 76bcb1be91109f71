"""What deploy/README.md tells people to do without a cluster works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.submit.kubernetes.manifests import load_manifests
from orchestrator.submit.kubernetes.rules import RULES, problems
from tests.submit.kubernetes.overlays import KUBERAY, OVERLAYS, cluster_spec, of_kind

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "deploy" / "README.md").read_text()
OFFLINE = re.findall(r"^    (.+)$", GUIDE.partition("## Without a cluster")[2], re.MULTILINE)


def test_guide_has_offline_commands_and_names_every_overlay() -> None:
    assert len(OFFLINE) >= 6
    assert f"and {len(RULES)} rules of" in " ".join(GUIDE.split())
    assert all(f"`{name}`" in GUIDE for name in OVERLAYS)


@pytest.mark.parametrize("text", OFFLINE[:1] + OFFLINE[-1:])
def test_guide_offline_command_of_others_works(text: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(text, shell=True, cwd=ROOT, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_guide_offline_commands_of_ours_work_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    monkeypatch.chdir(tmp_path)
    ours = [shlex.split(text)[1:] for text in OFFLINE if text.startswith("orchestrator ")]
    said = []
    for words in ours:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        said.append(done.stdout)
    assert said[-1].strip() == f"10 objects, {len(RULES)} rules, no problem"
    assert len(said) == 5


def test_guide_own_overlay_is_rendered_and_keeps_every_rule(tmp_path: Path) -> None:
    (example,) = [text for text in re.findall(r"```yaml\n(.+?)```", GUIDE, re.DOTALL) if "kind: Kustomization" in text]
    mine = tmp_path / "mine"
    mine.mkdir()
    digest = "sha256:" + "0" * 64
    # kustomize takes no absolute paths
    text = example.replace("../deploy/kuberay", os.path.relpath(KUBERAY, mine.resolve())).replace("sha256:...", digest)
    (mine / "kustomization.yaml").write_text(text.replace("REGISTRY", "registry.mine"))
    objects = load_manifests(mine)
    assert problems(objects) == []
    workers = cluster_spec(objects)["workerGroupSpecs"]
    assert [group["replicas"] for group in workers] == [1, 4]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in workers}
    assert images == {f"registry.mine/trt-orchestrator-cpu@{digest}"}
    annotations = of_kind(objects, "ServiceAccount")["metadata"]["annotations"]
    assert annotations == {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/trt-builds"}
