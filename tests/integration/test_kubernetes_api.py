"""`orchestrator k8s` against a real Kubernetes API server on loopback; a small controller plays KubeRay's operator.

Needs the binary (`make apiserver`) and etcd; skipped without.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.base.errors import AuthenticationError, ClusterError, ManifestError, UnreachableError, VerificationError
from orchestrator.cli.commands import app
from orchestrator.events import Event
from orchestrator.releases import read_release
from orchestrator.stores import open_store
from orchestrator.submit.kubernetes.api import RAY_JOB, ExpiredError, Kind, KubernetesApi
from orchestrator.submit.kubernetes.builds import Timing, list_builds
from orchestrator.submit.kubernetes.manifests import Fields, at, load_manifests
from orchestrator.submit.kubernetes.states import Phase
from orchestrator.submit.protocol import Notice
from tests.contracts.kubernetes_contract import SPEC, Bed, KubernetesContract, Recorder
from tests.integration.test_kubernetes_entrypoint import lay_out
from tests.support.fake_kubernetes import FakeKubernetes
from tests.support.kube_apiserver import ROOT, KubeApiserver, definition, for_1_20, run_apiserver, skip_reason
from tests.support.kuberay_operator import Driver, Operator, OperatorThread, error_line, ray_failure
from tests.support.ray_nodes import RayNodes
from tests.support.ray_nodes import skip_reason as ray_skip_reason

_REASON = skip_reason()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

TIMING = Timing(window=2.0, patience=20.0, backoff=0.1)
CRD = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition")
_NUMBERS = itertools.count()


class ServerAdmin:
    """See tests.support.kuberay_operator.Admin: an administrator of the server, in one namespace."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        from kubernetes import config
        from kubernetes.dynamic import DynamicClient

        client = config.new_client_from_config(str(kubeconfig))
        weakref.finalize(self, client.rest_client.pool_manager.clear)
        self._client = DynamicClient(client, cache_file="/dev/null/none")
        self._namespace = namespace

    def jobs(self) -> list[Fields]:
        return self._list("ray.io/v1", "RayJob")

    def owned(self) -> list[Fields]:
        found = [*self._list("v1", "ConfigMap"), *self._list("policy/v1beta1", "PodDisruptionBudget")]
        return [obj for obj in found if at(obj, "metadata.ownerReferences")]

    def set_status(self, job: Fields, status: Fields) -> None:
        resource = self._client.resources.get(api_version=job["apiVersion"], kind=job["kind"])
        self._patch(resource.subresources["status"], job, {"status": status})

    def set_finalizers(self, job: Fields, finalizers: list[str]) -> None:
        resource = self._client.resources.get(api_version=job["apiVersion"], kind=job["kind"])
        self._patch(resource, job, {"metadata": {"finalizers": finalizers}})

    def remove(self, obj: Fields) -> None:
        resource = self._client.resources.get(api_version=obj["apiVersion"], kind=obj["kind"])
        resource.delete(name=obj["metadata"]["name"], namespace=self._namespace, _request_timeout=5)

    def _list(self, api_version: str, kind: str) -> list[Fields]:
        found = self._client.resources.get(api_version=api_version, kind=kind).get(namespace=self._namespace, _request_timeout=5)
        return [{"apiVersion": api_version, "kind": kind, **item} for item in found.to_dict()["items"]]

    def _patch(self, resource: Any, obj: Fields, body: Fields) -> None:
        resource.patch(
            body=body, name=obj["metadata"]["name"], namespace=self._namespace,
            content_type="application/merge-patch+json", _request_timeout=5,
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApiserver]:
    with run_apiserver(tmp_path_factory.mktemp("kube")) as found:
        yield found


def test_submit_without_the_operators_definitions_says_what_to_install(server: KubeApiserver) -> None:
    """The first test: the fixtures of the others install them."""
    fresh = Bed(api_of(server, "admin"), Operator(FakeKubernetes()), TIMING, "default", for_1_20)
    with pytest.raises(ClusterError, match=r"knows no RayJob of ray\.io/v1") as error:
        fresh.submit(fresh.render())
    assert "KubeRay operator" in error.value.advice


@pytest.fixture(scope="module")
def kuberay(server: KubeApiserver) -> KubeApiserver:
    """The server, with RayJobs."""
    admin = api_of(server, "admin")
    admin.create(definition("RayJob", "rayjobs"))
    _wait(lambda: _is_served(admin))
    return server


def _is_served(admin: KubernetesApi) -> bool:
    found = admin.get(CRD, "", "rayjobs.ray.io")
    conditions = at(found, "status.conditions", []) or []
    return any(item["type"] == "Established" and item["status"] == "True" for item in conditions)


def _wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def api_of(server: KubeApiserver, user: str) -> KubernetesApi:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(server.kubeconfig(user)))
        return KubernetesApi()


@pytest.fixture
def namespace(kuberay: KubeApiserver) -> str:
    """A new one, with the rights that deploy/kuberay/namespace gives to those who submit builds."""
    name = f"builds-{next(_NUMBERS)}"
    admin = api_of(kuberay, "admin")
    for obj in load_manifests(ROOT / "deploy/kuberay/namespace"):
        if obj["kind"] == "Namespace":
            obj["metadata"]["name"] = name
        else:
            obj["metadata"]["namespace"] = name
        admin.create(obj)
    return name


@pytest.fixture
def bed(server: KubeApiserver, namespace: str) -> Iterator[Bed]:
    """What a user with no more than the Role of the namespace has to do with."""
    operator = Operator(ServerAdmin(server.kubeconfig("admin"), namespace))
    with OperatorThread(operator):
        yield Bed(api_of(server, "submitter"), operator, TIMING, namespace, for_1_20)


class TestApiServer(KubernetesContract):
    """The contract, with the rights of a submitter."""

    @staticmethod
    def add_pod(bed: Bed, cluster: str, message: str) -> None:
        assert isinstance(bed.operator.admin, ServerAdmin)
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{cluster}-head", "namespace": bed.namespace, "labels": {"ray.io/cluster": cluster}},
            "spec": {"containers": [{"name": "ray", "image": "image"}]},
        }
        client = bed.operator.admin._client
        client.resources.get(api_version="v1", kind="Pod").create(body=pod, namespace=bed.namespace)
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        bed.operator.admin.set_status(pod, {"phase": "Pending", "conditions": [condition]})


def test_submit_twice_at_the_same_moment_makes_one_build(bed: Bed) -> None:
    made, attached = bed.render(), []
    together = threading.Barrier(2)

    def run() -> None:
        together.wait()
        attached.append(bed.submit(made))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(attached) == [False, True]
    assert bed.follow(made).phase is Phase.SUCCEEDED
    assert len(bed.owners(made)) == 1


@dataclass
class Restarting(Recorder):
    """Starts the server again when it hears that it is away."""

    server: KubeApiserver | None = None

    def take(self, item: Event | Notice) -> None:
        super().take(item)
        if self.troubles and self.server is not None:
            self.server.start()
            self.server = None


def test_follow_server_that_is_killed_and_comes_back_is_waited_for(bed: Bed, server: KubeApiserver) -> None:
    made = bed.render()
    bed.submit(made, Driver("runs"))
    old = bed.job(made)["metadata"]["resourceVersion"]

    def kill() -> None:
        server.kill()
        bed.operator.drivers[made.name] = Driver()

    seen = Restarting({Phase.RUNNING: kill}, server=server)
    assert bed.follow(made, seen).phase is Phase.SUCCEEDED
    assert seen.server is None
    assert "does not answer" in seen.troubles[0]
    with pytest.raises(ExpiredError):  # it knows nothing of the time before it was started
        list(bed.api.watch(RAY_JOB, bed.namespace, made.name, str(int(old) - 1), 1.0))


def test_submit_without_rights_says_which_are_missing(bed: Bed, server: KubeApiserver) -> None:
    bed.api = api_of(server, "outsider")
    with pytest.raises(AuthenticationError, match="may not patch ServiceAccount/trt-orchestrator") as error:
        bed.submit(bed.render())
    assert f"Role in {bed.namespace}" in error.value.advice
    assert 'resources: ["serviceaccounts"], verbs: ["patch"]' in error.value.advice
    with pytest.raises(AuthenticationError) as error:
        list_builds(bed.api, bed.namespace)
    assert 'apiGroups: ["ray.io"], resources: ["rayjobs"], verbs: ["list"]' in error.value.advice


def test_submit_what_an_administrator_has_changed_stays_as_it_is(bed: Bed, server: KubeApiserver) -> None:
    policy = Kind("networking.k8s.io/v1", "NetworkPolicy")
    bed.submit(bed.render())
    changed = bed.api.get(policy, bed.namespace, "store")
    assert changed is not None
    changed["spec"]["egress"][0]["ports"][0]["port"] = 9000
    client = api_of(server, "admin")._client
    client.resources.get(api_version=policy.api_version, kind=policy.kind).replace(body=changed, field_manager="somebody")
    assert not bed.submit(bed.render({"dtype": "float16"}))
    kept = bed.api.get(policy, bed.namespace, "store")
    assert kept is not None
    assert kept["spec"]["egress"][0]["ports"][0]["port"] == 9000


def test_submit_with_an_unknown_token_is_refused(server: KubeApiserver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.tokens, "submitter", "wrong")
    with pytest.raises(AuthenticationError, match="does not accept the credentials"):
        api_of(server, "submitter")


def test_submit_into_a_namespace_that_is_not_there_says_so(bed: Bed, server: KubeApiserver) -> None:
    bed.api, bed.namespace = api_of(server, "admin"), "nowhere"
    with pytest.raises(ClusterError, match="there is no namespace nowhere"):
        bed.submit(bed.render())


def test_submit_job_that_the_schema_refuses_names_the_field(bed: Bed) -> None:
    with pytest.raises(ManifestError, match=r"spec\.backoffLimit"):
        bed.submit(bed.render(backoffLimit="many"))


def test_api_kind_that_is_not_installed_names_its_operator(bed: Bed) -> None:
    with pytest.raises(ClusterError, match="knows no LocalQueue") as error:
        bed.api.get(Kind("kueue.x-k8s.io/v1beta2", "LocalQueue"), bed.namespace, "q")
    assert "Kueue" in error.value.advice


def test_api_without_a_server_says_where_it_looked(server: KubeApiserver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ports", [*server.ports[:2], 9])
    with pytest.raises(UnreachableError, match=r"https://127\.0\.0\.1:9 does not answer: .*refused"):
        api_of(server, "submitter")


def test_stop_takes_the_last_of_a_build_away(bed: Bed) -> None:
    made = bed.render()
    bed.submit(made)
    bed.follow(made)
    assert bed.stop(made).phase is Phase.SUCCEEDED
    _wait(lambda: bed.owners(made) == set())


def write_overlay(folder: Path, *more: Fields) -> None:
    """A kustomization of the CPU overlay that Kubernetes 1.20 takes, with more patches."""
    ports = [
        {"op": "remove", "path": f"/spec/{way}/0/ports/{number}/endPort"} for way in ("ingress", "egress") for number in (0, 3)
    ]
    delete = "$patch: delete\napiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: NAME}\n"
    own = {
        "resources": [os.path.relpath(ROOT / "deploy/kuberay/overlays/cpu-aot", folder)],
        "patches": [
            {"target": {"kind": "NetworkPolicy", "name": "ray"}, "patch": json.dumps(ports)},
            *more,
            *({"patch": delete.replace("NAME", name)} for name in ("build-head", "build-driver")),
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))


@pytest.fixture
def submission(kuberay: KubeApiserver, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`orchestrator k8s submit` as a submitter types it, with an overlay of his own that Kubernetes 1.20 takes."""
    store = open_store((tmp_path / "store").as_uri())
    monkeypatch.setattr("orchestrator.submit.kubernetes.progress.open_store", lambda url, options: store)
    monkeypatch.setenv("KUBECONFIG", str(kuberay.kubeconfig("submitter")))
    write_overlay(tmp_path)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "release": {"name": "llama", "version": namespace}}))
    return [
        "submit", str(tmp_path / "spec.yaml"), "--overlay", str(tmp_path), "--store", "s3://mine/builds", "--name", "mine",
        "--namespace", namespace, "--image", "registry.test/orchestrator@sha256:" + "0" * 64,
    ]  # fmt: skip


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["k8s", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    print(f"$ orchestrator k8s {' '.join(words)}\n{done.output}exit code {done.exit_code}")
    return done.exit_code, done.output


def test_command_line_from_submission_to_the_end(bed: Bed, submission: list[str]) -> None:
    namespace = bed.namespace
    code, text = run(*submission)
    assert (code, text.splitlines()[0]) == (0, f"mine submitted, namespace {namespace}")
    assert text.splitlines()[-1] == f"published: s3://mine/builds/releases/llama/{namespace}/manifest.json"
    code, text = run(*submission, "--detach")
    assert (code, text) == (0, f"mine was submitted before: attached to it, namespace {namespace}\n")
    code, text = run("status", "mine", "-n", namespace)
    assert code == 0
    assert "state        succeeded" in text
    code, text = run("list", "-n", namespace)
    assert "mine  succeeded" in text
    assert run("stop", "mine", "-n", namespace) == (0, "stopping mine\nmine is gone (was: succeeded)\n")

    bed.operator.drivers["mine"] = Driver("fails", ray_failure(24, error_line("VerificationError", 24, "rank 1 is wrong")))
    code, text = run(*submission)
    assert code == VerificationError.exit_code
    assert "error: rank 1 is wrong" in text
    code, text = run("logs", "mine", "-n", namespace)
    assert code == 0
    assert json.loads(text.splitlines()[-1])["error"] == "VerificationError"


class RunningOperator(Operator):
    """Runs the entry point of a RayJob on a node of a real Ray cluster, in a folder that holds what its ConfigMap holds."""

    def __init__(self, admin: ServerAdmin, nodes: RayNodes, folder: Path) -> None:
        super().__init__(admin)
        self._nodes, self._folder, self._threads = nodes, folder, ThreadPoolExecutor(1)
        self._runs: dict[str, Future[Any]] = {}

    def _next(self, job: Fields, status: Fields) -> Fields | None:
        name = str(job["metadata"]["name"])
        if status.get("jobStatus") == "RUNNING":
            run = self._runs.get(name) or self._runs.setdefault(name, self._threads.submit(self._run, job))
            if not run.done():
                return None
            code, lines = run.result()
            self.drivers[name] = Driver("fails", ray_failure(code, *lines[-10:])) if code else Driver()
        return super()._next(job, status)

    def _run(self, job: Fields) -> tuple[int, list[str]]:
        (config,) = [obj for obj in self.admin.owned() if obj["kind"] == "ConfigMap"]
        folder = self._folder / str(job["metadata"]["uid"])
        lay_out(job, config, folder)
        done = self._nodes.run(2, "bash", "-c", f"cd {folder} && {job['spec']['entrypoint']}")
        return done.returncode, done.stdout.splitlines()


@pytest.mark.skipif(ray_skip_reason() is not None, reason=str(ray_skip_reason()))
def test_command_line_submits_a_build_that_real_ray_nodes_run(
    kuberay: KubeApiserver, namespace: str, ray_nodes: RayNodes, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kuberay.kubeconfig("submitter")))
    place = {"kind": "ray", "address": "auto", "store": ray_nodes.store_url, "pools": {"all": {}}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(place))
    engine = {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64}
    spec = {"source": {"path": str(tiny_llama)}, "engine": engine, "verification": {"enabled": False}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**spec, "release": {"name": "onkube", "version": "1"}}))
    pods = [f"/spec/rayClusterSpec/workerGroupSpecs/{group}/template/spec" for group in (0, 1)]
    volume = {"name": "all", "persistentVolumeClaim": {"claimName": "all"}}
    mounts = [{"name": "all", "mountPath": str(path)} for path in (tiny_llama, ray_nodes.folder)]
    claim = [{"op": "add", "path": f"{pod}/volumes/-", "value": volume} for pod in pods]
    claim += [{"op": "add", "path": f"{pod}/containers/0/volumeMounts/-", "value": mount} for pod in pods for mount in mounts]
    write_overlay(tmp_path, {"target": {"kind": "RayJob"}, "patch": json.dumps(claim)})
    operator = RunningOperator(ServerAdmin(kuberay.kubeconfig("admin"), namespace), ray_nodes, tmp_path)
    with OperatorThread(operator):
        code, text = run(
            "submit", str(tmp_path / "spec.yaml"), "--overlay", str(tmp_path), "--cluster", str(tmp_path / "cluster.yaml"),
            "--namespace", namespace, "--image", "registry.test/orchestrator@sha256:" + "0" * 64,
        )  # fmt: skip
    assert code == 0
    assert "steps, 0 committed or not needed" in text
    manifest = f"{ray_nodes.store_url}/releases/onkube/1/manifest.json"
    assert text.splitlines()[-1] == f"published: {manifest}"
    assert read_release(manifest)[1].name == "onkube"
