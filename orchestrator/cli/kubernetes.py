"""Commands for manifests and builds on a Kubernetes cluster: `orchestrator k8s ...`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import following
from orchestrator.cli.console import Json, SpecFile, exit_codes, out, plain, show, show_facts

if TYPE_CHECKING:
    from orchestrator.submit.kubernetes.builds import KubernetesSubmission
    from orchestrator.submit.kubernetes.render import Rendered
    from orchestrator.submit.kubernetes.states import State

app = typer.Typer(no_args_is_help=True, help="Builds on a Kubernetes cluster with the KubeRay operator.")

Overlay = Annotated[str, typer.Option("--overlay", help="Name (`orchestrator k8s overlays`), or a folder with a kustomization.")]
OverlayCluster = Annotated[
    Path | None, typer.Option("--cluster", help="Cluster file, YAML: pools of the overlay's pods; absent: the overlay's own.")
]
Store = Annotated[str | None, typer.Option("--store", help="URL of the store; overrides the cluster file's.")]
Images = Annotated[
    list[str] | None, typer.Option("--image", help="IMAGE for all containers, or NAME=IMAGE for those called NAME; repeatable.")
]
Deploy = Annotated[
    Path | None, typer.Option("--deploy", help="Folder like deploy/kuberay, with overlays/; absent: the package's own.")
]
OwnName = Annotated[str | None, typer.Option("--name", help="Name of the RayJob; absent: derived from build and store.")]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig; absent: its current one.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the build.")]
BuildName = Annotated[str, typer.Argument(metavar="NAME", help="Name that `submit` or `list` printed.")]
OverlayNamespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace of the build; absent: the overlay's.")]
_NAMESPACE = "trt-builds"


@app.command("validate")
def validate(
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE|FOLDER|-", help="File or folder of manifests, or with a kustomization; -: stdin."),
    ],
    as_json: Json = False,
) -> None:
    """Check manifests against the rules of a build (`orchestrator k8s rules`), without a cluster.

    The cluster checks fields, types and the operator's own conditions: `kubectl apply --dry-run=server -f FILE`.
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


@app.command("rules")
def rules() -> None:
    """List the rules that `validate` checks."""
    from orchestrator.submit.kubernetes.rules import RULES

    for rule in RULES:
        out.print(f"{rule.id}  {plain(rule.title)}", soft_wrap=True)


@app.command("overlays")
def overlays(deploy: Deploy = None) -> None:
    """List the overlays for rendering a build."""
    with exit_codes():
        from orchestrator.submit.kubernetes.overlays import OWN, overlay_names

        for name in overlay_names(deploy or OWN):
            out.print(name)


def _rendered(
    spec: Path, overlay: str, cluster: Path | None, store: str | None, name: str | None, namespace: str | None,
    images: list[str] | None, deploy: Path | None,
) -> Rendered:  # fmt: skip
    from orchestrator.spec.loading import load_cluster, load_spec
    from orchestrator.submit.bundle import pack
    from orchestrator.submit.kubernetes.overlays import OWN, load_overlay
    from orchestrator.submit.kubernetes.render import overlay_cluster, render

    packed = pack(load_spec(spec))
    objects = load_overlay(overlay, deploy or OWN)
    place = load_cluster(cluster) if cluster else overlay_cluster(objects)
    if store:
        place = place.model_copy(update={"store": store})
    pairs = [image.rpartition("=") if "=" in image.partition("@")[0] else ("", "", image) for image in images or []]
    return render(
        packed.spec, place, objects,
        name=name, namespace=namespace, images={of: image for of, _, image in pairs},
        files={path: file.read_bytes() for path, file in packed.files.items()},
    )  # fmt: skip


@app.command("render")
def render_command(
    spec: SpecFile,
    overlay: Overlay,
    cluster: OverlayCluster = None,
    store: Store = None,
    name: OwnName = None,
    namespace: OverlayNamespace = None,
    image: Images = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for one file per object, or - for stdout.")] = "-",
    deploy: Deploy = None,
) -> None:
    """Print the checked manifests of a build: `orchestrator k8s render ... | kubectl apply --server-side -f -`."""
    with exit_codes():
        made = _rendered(spec, overlay, cluster, store, name, namespace, image, deploy)
        if output == "-":
            print(made.to_yaml(), end="")
            return
        for path in made.write(Path(output)):
            out.print(str(path), soft_wrap=True)


@app.command("submit")
def submit_command(
    spec: SpecFile,
    overlay: Overlay,
    cluster: OverlayCluster = None,
    store: Store = None,
    name: OwnName = None,
    namespace: OverlayNamespace = None,
    image: Images = None,
    deploy: Deploy = None,
    context: Context = None,
    follow: Annotated[
        bool, typer.Option("--follow/--detach", help="Show the build and end with its exit code; Ctrl-C only detaches.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Build on the cluster. Submitting the same build again attaches to its RayJob, or resumes a failed one."""
    with exit_codes(as_json):
        from orchestrator.submit.kubernetes.api import KubernetesApi
        from orchestrator.submit.kubernetes.builds import submit
        from orchestrator.submit.kubernetes.render import refuse_placeholder_images

        made = _rendered(spec, overlay, cluster, store, name, namespace, image, deploy)
        refuse_placeholder_images(made)
        done = submit(KubernetesApi(context), made)
        if as_json:
            facts = {"name": done.id, "namespace": done.namespace, "attached": done.attached}
            print(json.dumps({"event": "submitted", **facts}), flush=True)
        else:
            what = "was submitted before: attached to it" if done.attached else "submitted"
            out.print(f"{done.id} {what}, namespace {done.namespace}", soft_wrap=True)
        if follow:
            _follow(done, as_json)


@app.command("status")
def status_command(name: BuildName, namespace: Namespace = _NAMESPACE, context: Context = None, as_json: Json = False) -> None:
    """Print the state of a build, and why its pods do not run."""
    with exit_codes(as_json):
        build = _build(context, namespace, name)
        state = build.status()
        show_facts(_facts(state, build.troubles(state)), as_json)


@app.command("list")
def list_command(namespace: Namespace = _NAMESPACE, context: Context = None, as_json: Json = False) -> None:
    """List the builds of a namespace, newest first."""
    with exit_codes(as_json):
        from rich.table import Table

        from orchestrator.submit.kubernetes.api import KubernetesApi
        from orchestrator.submit.kubernetes.builds import list_builds

        facts = [_facts(found) for found in list_builds(KubernetesApi(context), namespace)]
        table = Table("name", "state", "attempt", "created", "release", box=None, pad_edge=False)
        for fact in facts:
            table.add_row(fact["name"], fact["state"], str(fact["attempt"]), fact["created"], fact["release"])
        show({"builds": facts}, [table], as_json)


@app.command("stop")
def stop_command(name: BuildName, namespace: Namespace = _NAMESPACE, context: Context = None, as_json: Json = False) -> None:
    """Stop a build and remove its pods. Committed steps stay; a new submission resumes from them."""
    with exit_codes(as_json):
        build = _build(context, namespace, name)
        if not as_json:
            out.print(f"stopping {name}")
        state = build.cancel()
        show({"name": name, "was": state.phase.value}, [], as_json)
        if not as_json:
            out.print(f"{name} is gone (was: {state.phase.value})")


def _build(context: str | None, namespace: str, name: str) -> KubernetesSubmission:
    from orchestrator.submit.kubernetes.api import KubernetesApi
    from orchestrator.submit.kubernetes.builds import KubernetesSubmission

    return KubernetesSubmission(KubernetesApi(context), namespace, name)


def _facts(state: State, troubles: Sequence[str] = ()) -> dict[str, Any]:
    """Return the facts of a build, for people and machines."""
    lines = [line for line in state.message.strip().splitlines() if line]
    return {
        "name": state.name,
        "state": "being deleted" if state.deleting else state.phase.value,
        "attempt": state.attempt,
        "reason": state.reason,
        "message": lines[0] if lines else "",
        "created": state.created,
        "started": state.started,
        "ended": state.ended,
        "ray_cluster": state.ray_cluster,
        "job_id": state.job_id,
        "release": state.release,
        "trouble": [*troubles],
    }


@app.command("logs")
def logs_command(
    name: BuildName,
    namespace: Namespace = _NAMESPACE,
    context: Context = None,
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the build ends, then exit with its code.")] = False,
) -> None:
    """Print the driver's events as JSON lines, from the store; for a failed driver, also the end of its log."""
    with exit_codes():
        from orchestrator.base.errors import StoreError
        from orchestrator.events import encode_line

        build = _build(context, namespace, name)
        if follow:
            _follow(build, as_json=True)
            return
        state, progress = build.status(), build.progress()
        if progress is None:
            raise StoreError(f"the bundle of {name} is gone, which names its store", "orchestrator watch STORE shows it.")
        for event in progress.poll(state.attempt):
            print(encode_line(event))
        if state.message and state.phase.is_over:
            print(state.message)


def _follow(build: KubernetesSubmission, as_json: bool) -> None:
    where = f"{build.id} -n {build.namespace}"
    commands = [f"orchestrator k8s logs {where} --follow", f"orchestrator k8s stop {where}"]
    following.show_build(build, as_json, build.id, commands)
