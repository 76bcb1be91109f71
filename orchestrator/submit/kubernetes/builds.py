"""A build on Kubernetes from the outside: bring it there, look, stop. The API is passed in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.base.errors import AuthenticationError, ClusterError, UnknownSubmissionError, UnreachableError
from orchestrator.submit.kubernetes.api import POD, RAY_JOB, Api, ConflictError, ExpiredError, Kind
from orchestrator.submit.kubernetes.manifests import Fields, at
from orchestrator.submit.kubernetes.render import MANAGER, PART_OF, RELEASE, SUBMISSION, Rendered
from orchestrator.submit.kubernetes.states import State, on_submit, state_of, troubles


@dataclass(frozen=True)
class Timing:
    """How long to wait for what, in seconds, and the clock: tests have one that jumps."""

    window: float = 4.0
    """One watch; between two, the driver's events are fetched."""
    patience: float = 300.0
    """With an API server that does not answer, an operator that does nothing, or an object that is being deleted."""
    backoff: float = 2.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Submitted:
    """What came of a submission."""

    name: str
    namespace: str
    attached: bool
    """The same build was there already: running, or at its end."""


def submit(api: Api, rendered: Rendered, timing: Timing | None = None) -> Submitted:
    """Make a build's objects, or find that it is there. One that failed or was stopped is made anew: it goes on from its steps.

    Raises ClusterError when the name belongs to another build, and the errors of Api.
    """
    timing = timing or Timing()
    name, namespace = rendered.name, rendered.namespace
    for obj in rendered.shared:
        _share(api, obj)
    while True:
        there = api.get(RAY_JOB, namespace, name)
        if (
            there is not None
            and at(there, "metadata.annotations", {}).get(SUBMISSION) != rendered.job["metadata"]["annotations"][SUBMISSION]
        ):
            raise ClusterError(
                f"RayJob {name} in {namespace} is another build", f"Choose another --name, or `orchestrator k8s stop {name}` first."
            )
        what = on_submit(None if there is None else state_of(there))
        if what == "attach" and there is not None:
            _give_own(api, rendered, there)
            return Submitted(name, namespace, attached=True)
        if what == "replace":
            api.delete(RAY_JOB, namespace, name)
        if what in ("replace", "wait"):
            _wait_until_gone(api, namespace, name, timing)
        try:
            made = api.create(rendered.job)
        except ConflictError:
            continue  # somebody else was faster: it is there now
        _give_own(api, rendered, made)
        return Submitted(name, namespace, attached=False)


def _share(api: Api, obj: Fields) -> None:
    """What all builds of a namespace share: what an administrator has changed stays, and who may not make it needs it there."""
    try:
        api.apply(obj)
    except ConflictError:
        return
    except AuthenticationError:
        if _find(api, obj) is None:
            raise


def _find(api: Api, obj: Fields) -> Fields | None:
    try:
        return api.get(Kind.of(obj), str(at(obj, "metadata.namespace", "")), str(at(obj, "metadata.name")))
    except AuthenticationError:
        return None


def _give_own(api: Api, rendered: Rendered, job: Fields) -> None:
    """The objects that go with this RayJob, made as its own; an older RayJob's are replaced: they are about to be collected."""
    uid = str(at(job, "metadata.uid"))
    owner = {"apiVersion": RAY_JOB.api_version, "kind": RAY_JOB.kind, "name": rendered.name, "uid": uid}
    for obj in rendered.owned:
        there = api.get(Kind.of(obj), rendered.namespace, str(obj["metadata"]["name"]))
        if there is not None:
            if any(found.get("uid") == uid for found in at(there, "metadata.ownerReferences", []) or []):
                continue
            api.delete(Kind.of(obj), rendered.namespace, str(obj["metadata"]["name"]))
        try:
            api.create({**obj, "metadata": {**obj["metadata"], "ownerReferences": [owner]}})
        except ConflictError:
            continue  # a submission beside this one made it


def pod_troubles(api: Api, namespace: str, state: State) -> list[str]:
    """Why the build's pods do not run; nothing for who may not list pods, or while nobody answers."""
    if not state.ray_cluster:
        return []
    try:
        return troubles(api.list(POD, namespace, f"ray.io/cluster={state.ray_cluster}"))
    except (AuthenticationError, UnreachableError):
        return []


@dataclass(frozen=True)
class Status:
    """A build as it is seen now."""

    state: State
    release: str
    """Where its release is, or is going to be."""
    troubles: list[str]


def status(api: Api, namespace: str, name: str) -> Status:
    """Raises UnknownSubmissionError and the errors of Api."""
    job = api.get(RAY_JOB, namespace, name)
    if job is None:
        raise unknown(namespace, name)
    state = state_of(job)
    return Status(state, release_of(job), [] if state.phase.is_over else pod_troubles(api, namespace, state))


def unknown(namespace: str, name: str) -> UnknownSubmissionError:
    """The error of a build that is not there."""
    return UnknownSubmissionError(
        f"there is no RayJob {name} in namespace {namespace}", "`orchestrator k8s list -n NAMESPACE` shows those that are there."
    )


def release_of(job: Fields) -> str:
    """Where a build's release is, or is going to be; "" for a RayJob that was not made here."""
    return str((at(job, "metadata.annotations", {}) or {}).get(RELEASE, ""))


def list_builds(api: Api, namespace: str) -> list[Status]:
    """Builds of a namespace, the newest first."""
    jobs = api.list(RAY_JOB, namespace, f"{PART_OF}={MANAGER}")
    found = [Status(state_of(job), release_of(job), []) for job in jobs]
    return sorted(found, key=lambda status: status.state.created, reverse=True)


def stop(api: Api, namespace: str, name: str, timing: Timing | None = None) -> State:
    """Delete a build's RayJob and wait until it is gone: the operator stops the driver and takes the pods away.

    Returns the state that it was in. Raises UnknownSubmissionError, ClusterError when nobody takes it away, the errors of Api.
    """
    state = status(api, namespace, name).state
    api.delete(RAY_JOB, namespace, name)
    _wait_until_gone(api, namespace, name, timing or Timing())
    return state


def _wait_until_gone(api: Api, namespace: str, name: str, timing: Timing) -> None:
    """Raises ClusterError."""
    began = timing.now()
    while True:
        job = api.get(RAY_JOB, namespace, name)
        if job is None:
            return
        if timing.now() - began >= timing.patience:
            raise ClusterError(
                f"RayJob {name} is still being deleted after {timing.patience:.0f} s",
                "Check that the KubeRay operator runs: it ends the driver, then lets the RayJob go.",
            )
        try:
            version = str(at(job, "metadata.resourceVersion"))
            if any(seen is None for seen in api.watch(RAY_JOB, namespace, name, version, min(timing.window, timing.patience))):
                return
        except ExpiredError:
            continue
