"""Builds on a Kubernetes cluster: `orchestrator k8s render|submit|status|logs|stop|list`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.console import Json, SpecFile, exit_codes, out, plain, show

if TYPE_CHECKING:
    from orchestrator.events.builds import BuildEvent
    from orchestrator.report import LiveView
    from orchestrator.submit.kubernetes.api import KubernetesApi
    from orchestrator.submit.kubernetes.builds import Status
    from orchestrator.submit.kubernetes.progress import StoreProgress
    from orchestrator.submit.kubernetes.render import Rendered
    from orchestrator.submit.kubernetes.states import State

app = typer.Typer()

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
Context = Annotated[str | None, typer.Option("--context", help="Of the kubeconfig; absent: its current one.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Of the build.")]
BuildName = Annotated[str, typer.Argument(metavar="NAME", help="As `submit` said, or `list`.")]
OverlayNamespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Absent: the overlay's.")]
_NAMESPACE = "trt-builds"


@app.command("overlays")
def overlays(deploy: Deploy = None) -> None:
    """List the overlays that a build can be rendered with."""
    with exit_codes():
        from orchestrator.submit.kubernetes.overlays import OWN, overlay_names

        for name in overlay_names(deploy or OWN):
            out.print(name)


def _rendered(
    spec: Path, overlay: str, cluster: Path | None, store: str | None, name: str | None, namespace: str | None,
    images: list[str] | None, deploy: Path | None,
) -> Rendered:  # fmt: skip
    from orchestrator.spec.loading import load_cluster, load_spec
    from orchestrator.submit.kubernetes.overlays import OWN, load_overlay
    from orchestrator.submit.kubernetes.render import overlay_cluster, render
    from orchestrator.submit.submission import pack

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
        bool, typer.Option("--follow/--detach", help="Show the build and end with its exit code; Ctrl-C only looks away.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Build on the cluster. The same build again attaches to its RayJob; a failed one goes on where it was."""
    with exit_codes(as_json):
        from orchestrator.submit.kubernetes.api import KubernetesApi
        from orchestrator.submit.kubernetes.builds import submit
        from orchestrator.submit.kubernetes.render import refuse_placeholder_images

        made = _rendered(spec, overlay, cluster, store, name, namespace, image, deploy)
        refuse_placeholder_images(made)
        api = KubernetesApi(context)
        done = submit(api, made)
        if as_json:
            print(json.dumps({"event": "submitted", **asdict(done)}), flush=True)
        else:
            what = "was submitted before: attached to it" if done.attached else "submitted"
            out.print(f"{done.name} {what}, namespace {done.namespace}", soft_wrap=True)
        if follow:
            _follow(api, done.namespace, done.name, as_json)


@app.command("status")
def status_command(name: BuildName, namespace: Namespace = _NAMESPACE, context: Context = None, as_json: Json = False) -> None:
    """Say where a build stands, and why its pods do not run."""
    with exit_codes(as_json):
        from orchestrator.submit.kubernetes.api import KubernetesApi
        from orchestrator.submit.kubernetes.builds import status

        facts = _facts(status(KubernetesApi(context), namespace, name))
        if as_json:
            print(json.dumps(facts, indent=1))
            return
        for key, value in facts.items():
            for line in value if isinstance(value, list) else [value]:
                if line not in ("", None):
                    out.print(f"{key:<12} {plain(str(line))}", soft_wrap=True)


@app.command("list")
def list_command(namespace: Namespace = _NAMESPACE, context: Context = None, as_json: Json = False) -> None:
    """List the builds of a namespace, the newest first."""
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
    """End a build and take its pods away; what is committed stays, and a new submission goes on from there."""
    with exit_codes(as_json):
        from orchestrator.submit.kubernetes.api import KubernetesApi
        from orchestrator.submit.kubernetes.builds import stop

        api = KubernetesApi(context)
        if not as_json:
            out.print(f"{name} is asked to end")
        state = stop(api, namespace, name)
        show({"name": name, "was": state.phase.value}, [], as_json)
        if not as_json:
            out.print(f"{name} is gone (was: {state.phase.value})")


def _facts(found: Status) -> dict[str, Any]:
    """Of a build, for people and machines."""
    state = found.state
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
        "release": found.release,
        "trouble": found.troubles,
    }


class _Told:
    """Says what happens to a build, to people or to machines."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._view: LiveView | None = None

    def on_state(self, state: State) -> None:
        if self._as_json:
            fields = {
                "state": state.phase.value,
                "attempt": state.attempt,
                "reason": state.reason,
                "ray_cluster": state.ray_cluster,
            }
            print(json.dumps({"event": "state", "name": state.name, **fields}), flush=True)
            return
        attempt = f", attempt {state.attempt}" if state.attempt > 1 and not state.phase.is_over else ""
        where = f" ({state.ray_cluster})" if state.ray_cluster and not state.phase.is_over else ""
        out.print(f"{state.name}: {state.phase.value}{attempt}{where}", soft_wrap=True)

    def on_event(self, event: BuildEvent) -> None:
        from orchestrator.events.builds import Errored, Published, encode_line
        from orchestrator.report import LiveView

        if not self._as_json:
            self._view = self._view or LiveView(out)
            self._view.on(event)
        elif not isinstance(event, (Published, Errored)):  # the last word is that of this command
            print(encode_line(event), flush=True)

    def on_trouble(self, lines: list[str]) -> None:
        for line in lines:
            if self._as_json:
                print(json.dumps({"event": "trouble", "message": line}), flush=True)
            else:
                out.print(f"[yellow]{plain(line)}[/]", soft_wrap=True)

    def close(self) -> None:
        if self._view is not None:
            self._view.close()


def _progress(api: KubernetesApi, namespace: str, name: str, told: _Told) -> StoreProgress | None:
    from orchestrator.base.errors import AuthenticationError, SpecError, StoreError, ToolError
    from orchestrator.submit.kubernetes.progress import progress_of

    try:
        return progress_of(api, namespace, name)
    except (AuthenticationError, SpecError, StoreError, ToolError) as error:
        told.on_trouble([f"the driver's events are not seen from here: {error.message}"])
        return None


@app.command("logs")
def logs_command(
    name: BuildName,
    namespace: Namespace = _NAMESPACE,
    context: Context = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the build ends, then end with its exit code.")] = False,
) -> None:
    """Print the driver's events, JSON lines of the store; of a driver that failed, the end of its log too."""
    with exit_codes():
        from orchestrator.base.errors import StoreError
        from orchestrator.events.builds import encode_line
        from orchestrator.submit.kubernetes.api import KubernetesApi
        from orchestrator.submit.kubernetes.builds import status
        from orchestrator.submit.kubernetes.progress import progress_of

        api = KubernetesApi(context)
        if follow:
            _follow(api, namespace, name, as_json=True)
            return
        state = status(api, namespace, name).state
        progress = progress_of(api, namespace, name)
        if progress is None:
            raise StoreError(f"the bundle of {name} is gone, which says where its store is", "orchestrator watch STORE shows it.")
        for event in progress.poll(state):
            print(encode_line(event))
        if state.message and state.phase.is_over:
            print(state.message)


def _follow(api: KubernetesApi, namespace: str, name: str, as_json: bool) -> None:
    """To the end of the build: its release, or its own error and exit code."""
    from orchestrator.submit.kubernetes.builds import status
    from orchestrator.submit.kubernetes.follow import follow

    told = _Told(as_json)
    try:
        follow(api, namespace, name, told, _progress(api, namespace, name, told))
    except KeyboardInterrupt:
        told.close()
        if not as_json:
            out.print(f"Looked away; {name} goes on. Run the same command again to look on, or:")
            out.print(f"  orchestrator k8s stop {name} -n {namespace}", soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        told.close()
    manifest = f"{status(api, namespace, name).release}/manifest.json"
    if as_json:
        print(json.dumps({"event": "published", "manifest": manifest}), flush=True)
    else:
        out.print(f"published: {manifest}", soft_wrap=True)
