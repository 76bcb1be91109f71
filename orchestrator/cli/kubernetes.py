"""Commands for builds on Kubernetes: `orchestrator k8s ...`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.console import Json, exit_codes, out, plain

if TYPE_CHECKING:
    from orchestrator.kubernetes.render import Rendered

app = typer.Typer()
k8s_app = typer.Typer(no_args_is_help=True, help="Builds on a Kubernetes cluster with the KubeRay operator.")
app.add_typer(k8s_app, name="k8s")


@k8s_app.command("validate")
def validate(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="Manifests, or a folder with a kustomization.")],
    as_json: Json = False,
) -> None:
    """Check manifests against the operator's rules, pod security and this program's needs, without a cluster."""
    with exit_codes(as_json):
        from orchestrator.core.errors import ManifestError
        from orchestrator.kubernetes import validate as validating
        from orchestrator.kubernetes.manifests import load_manifests
        from orchestrator.kubernetes.rules import RULES

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
    from orchestrator.kubernetes.rules import RULES

    for rule in RULES:
        out.print(f"{rule.id}  {plain(rule.title)}", soft_wrap=True)


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="Build spec, YAML.")]
Overlay = Annotated[str, typer.Option("--overlay", help="Name (`orchestrator k8s overlays`), or a folder with a kustomization.")]
OverlayCluster = Annotated[
    Path | None, typer.Option("--cluster", help="Cluster file, YAML: pools of the overlay's pods; absent: the overlay's own.")
]
Store = Annotated[str | None, typer.Option("--store", help="URL of the store; overrides the cluster file's.")]
Images = Annotated[
    list[str] | None, typer.Option("--image", help="Image of every container, or NAME=IMAGE for those of one name; repeatable.")
]
Deploy = Annotated[
    Path | None, typer.Option("--deploy", help="Folder like deploy/kuberay, with overlays/; absent: the package's own.")
]
OwnName = Annotated[str | None, typer.Option("--name", help="Of the RayJob; absent: the same for the same build and store.")]
OverlayNamespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Absent: the overlay's.")]


@k8s_app.command("overlays")
def overlays(deploy: Deploy = None) -> None:
    """List the overlays that a build can be rendered with."""
    with exit_codes():
        from orchestrator.kubernetes.overlays import OWN, overlay_names

        for name in overlay_names(deploy or OWN):
            out.print(name)


def _rendered(
    spec: Path, overlay: str, cluster: Path | None, store: str | None, name: str | None, namespace: str | None,
    images: list[str] | None, deploy: Path | None,
) -> Rendered:  # fmt: skip
    from orchestrator.kubernetes.overlays import OWN, load_overlay
    from orchestrator.kubernetes.render import overlay_cluster, render
    from orchestrator.loading import load_cluster, load_spec

    wanted = load_spec(spec)
    objects = load_overlay(overlay, deploy or OWN)
    place = load_cluster(cluster) if cluster else overlay_cluster(objects)
    if store:
        place = place.model_copy(update={"store": store})
    pairs = [image.rpartition("=") if "=" in image.partition("@")[0] else ("", "", image) for image in images or []]
    return render(wanted, place, objects, name=name, namespace=namespace, images={of: image for of, _, image in pairs})


@k8s_app.command("render")
def render_command(
    spec: SpecFile,
    overlay: Overlay,
    cluster: OverlayCluster = None,
    store: Store = None,
    name: OwnName = None,
    namespace: OverlayNamespace = None,
    image: Images = None,
    output: Annotated[str, typer.Option("--output", "-o", help="A folder for one file per object; - is stdout.")] = "-",
    deploy: Deploy = None,
) -> None:
    """Print the manifests of a build, checked: `orchestrator k8s render ... | kubectl apply --server-side -f -`."""
    with exit_codes():
        made = _rendered(spec, overlay, cluster, store, name, namespace, image, deploy)
        if output == "-":
            print(made.to_yaml(), end="")
            return
        for path in made.write(Path(output)):
            out.print(str(path), soft_wrap=True)
