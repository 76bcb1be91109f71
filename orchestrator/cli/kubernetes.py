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
    """Check manifests against the operator's rules, pod security and this program's needs, without a cluster."""
    with exit_codes(as_json):
        from orchestrator.base.errors import ManifestError
        from orchestrator.submit.kubernetes import validate as validating
        from orchestrator.submit.kubernetes.manifests import load_manifests
        from orchestrator.submit.kubernetes.rules import RULES

        objects = load_manifests(path)
        if as_json:
            found = validating.problems(objects)
            print(json.dumps({"objects": len(objects), "rules": len(RULES), "problems": [asdict(item) for item in found]}))
            raise typer.Exit(ManifestError.exit_code if found else 0)
        validating.validate(objects)
        out.print(f"{len(objects)} objects, {len(RULES)} rules, no problem")


@k8s_app.command("rules")
def rules() -> None:
    """List what `validate` checks."""
    from orchestrator.submit.kubernetes.rules import RULES

    for rule in RULES:
        out.print(f"{rule.id}  {plain(rule.title)}", soft_wrap=True)
