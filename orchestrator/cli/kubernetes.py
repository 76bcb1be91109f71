"""Commands for builds on Kubernetes: `orchestrator k8s ...`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.console import Json, exit_codes, out, plain

app = typer.Typer()
k8s_app = typer.Typer(no_args_is_help=True, help="Builds on a Kubernetes cluster with the KubeRay operator.")
app.add_typer(k8s_app, name="k8s")


@k8s_app.command("validate")
def validate(
    path: Annotated[
        Path, typer.Argument(metavar="FILE|FOLDER|-", help="Manifests, a folder of them or with a kustomization, or stdin.")
    ],
    as_json: Json = False,
) -> None:
    """Check manifests against what a build needs (`orchestrator k8s rules`), without a cluster.

    Fields, their types and the operator's own conditions are the cluster's to check: `kubectl apply --dry-run=server -f FILE`.
    """
    with exit_codes(as_json):
        from orchestrator.base.errors import ManifestError
        from orchestrator.submit.kubernetes import rules as checked
        from orchestrator.submit.kubernetes.manifests import load_manifests

        objects = load_manifests(path)
        if as_json:
            found = checked.problems(objects)
            print(json.dumps({"objects": len(objects), "rules": len(checked.RULES), "problems": [asdict(item) for item in found]}))
            raise typer.Exit(ManifestError.exit_code if found else 0)
        checked.validate(objects)
        out.print(f"{len(objects)} objects, {len(checked.RULES)} rules, no problem")


@k8s_app.command("rules")
def rules() -> None:
    """List what `validate` checks."""
    from orchestrator.submit.kubernetes.rules import RULES

    for rule in RULES:
        out.print(f"{rule.id}  {plain(rule.title)}", soft_wrap=True)
