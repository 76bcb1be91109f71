"""Submit, follow and stop a build on Kubernetes. The API is passed in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator.base.errors import AuthenticationError, CancelledError, ClusterError, UnknownSubmissionError, UnreachableError
from orchestrator.events import Errored, Event, Planned, Published
from orchestrator.submit.kubernetes.api import POD, RAY_JOB, ConflictError, ExpiredError, Kind, KubernetesApi
from orchestrator.submit.kubernetes.manifests import Fields, at
from orchestrator.submit.kubernetes.progress import UNREADABLE, StoreProgress, progress_of
from orchestrator.submit.kubernetes.render import MANAGER, PART_OF, SUBMISSION, Rendered
from orchestrator.submit.kubernetes.states import Phase, State, failure, state_of, troubles, unchanging
from orchestrator.submit.protocol import Clock, Existing, Notice, Patience, decide


@dataclass(frozen=True)
class Timing:
    """Waiting times in seconds."""

    window: float = 4.0
    """Length of one watch. Between two, the driver's events are fetched."""
    patience: float = 300.0
    """Longest wait for an API server that does not answer, an idle operator, or an object that is being deleted."""
    backoff: float = 2.0
    clock: Clock = field(default_factory=Clock)


def submit(api: KubernetesApi, rendered: Rendered, timing: Timing | None = None) -> KubernetesSubmission:
    """Create a build's objects, or find its RayJob. A failed or stopped RayJob is replaced, and resumes from its committed steps.

    Raises ClusterError when the name belongs to another build, and the errors of KubernetesApi.
    """
    name, namespace = rendered.name, rendered.namespace
    found = KubernetesSubmission(api, namespace, name, timing=timing)
    for obj in rendered.shared:
        _share(api, obj)
    while True:
        there = api.get(RAY_JOB, namespace, name)
        what = decide(None if there is None else _existing(there, rendered))
        if what == "refuse":
            raise ClusterError(
                f"RayJob {name} in {namespace} is another build", f"Choose another --name, or `orchestrator k8s stop {name}` first."
            )
        if what == "attach" and there is not None:
            _give_own(api, rendered, there)
            return found
        if what == "replace":
            api.delete(RAY_JOB, namespace, name)
        if what in ("replace", "wait"):
            found.wait_until_gone()
        try:
            made = api.create(rendered.job)
        except ConflictError:
            continue  # another submission was faster: the RayJob exists now
        _give_own(api, rendered, made)
        found.attached = False
        return found


def _existing(job: Fields, rendered: Rendered) -> Existing:
    state, wanted = state_of(job), rendered.job["metadata"]["annotations"][SUBMISSION]
    return Existing(
        failed=state.phase in (Phase.FAILED, Phase.STOPPED),
        other_build=at(job, "metadata.annotations", {}).get(SUBMISSION) != wanted,
        being_deleted=state.deleting,
    )


def _share(api: KubernetesApi, obj: Fields) -> None:
    """Apply an object shared by all builds of a namespace. Fields of others stay; without the right to apply, it must exist."""
    try:
        api.apply(obj)
    except ConflictError:
        return
    except AuthenticationError:
        with contextlib.suppress(AuthenticationError):
            if api.get(Kind.of(obj), str(at(obj, "metadata.namespace", "")), str(at(obj, "metadata.name"))) is not None:
                return
        raise


def _give_own(api: KubernetesApi, rendered: Rendered, job: Fields) -> None:
    """Create the dependents of this RayJob. An older RayJob's are replaced, since they are about to be deleted."""
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
            continue  # a concurrent submission created it


def list_builds(api: KubernetesApi, namespace: str) -> list[State]:
    """Return the builds of a namespace, newest first."""
    found = [state_of(job) for job in api.list(RAY_JOB, namespace, f"{PART_OF}={MANAGER}")]
    return sorted(found, key=lambda state: state.created, reverse=True)


class KubernetesSubmission:
    """A submitted build, which runs whether or not anyone follows it: Followed. Every method raises the errors of KubernetesApi."""

    def __init__(
        self, api: KubernetesApi, namespace: str, name: str, *, timing: Timing | None = None, progress: StoreProgress | None = None
    ) -> None:
        """`progress`: source of the driver's events; absent: the store of the build's bundle."""
        self.id, self.namespace = name, namespace
        self.attached = True
        """Whether the build existed before it was submitted."""
        self._api, self._timing, self._progress = api, timing or Timing(), progress
        self._end: State | None = None
        self._last_word: Published | Errored | None = None
        """Final event of the driver in the current attempt."""

    def status(self) -> State:
        """Return the build as it is now. Raises UnknownSubmissionError."""
        job = self._api.get(RAY_JOB, self.namespace, self.id)
        if job is None:
            raise self._unknown()
        return state_of(job)

    def progress(self) -> StoreProgress | None:
        """Return the source of the driver's events; None when the bundle is gone. Raises one of UNREADABLE."""
        return progress_of(self._api, self.namespace, self.id)

    def troubles(self, state: State) -> list[str]:
        """Return why the build's pods do not run; empty without the right to list pods, or without an answer."""
        if not state.ray_cluster or state.phase.is_over:
            return []
        try:
            return troubles(self._api.list(POD, self.namespace, f"ray.io/cluster={state.ray_cluster}"))
        except (AuthenticationError, UnreachableError):
            return []

    def events(self) -> Iterator[Event | Notice]:
        """See Followed. Yields also the build's states, and why its pods do not run, each once.

        Raises CancelledError when the build is deleted meanwhile, NotStartedError when no operator touches it,
        UnknownSubmissionError.
        """
        began = self._timing.clock.now()
        reported: tuple[object, ...] = ()
        shown: list[str] = []
        unread = ""
        try:
            self._progress = self._progress or self.progress()
        except UNREADABLE as error:
            yield _unread(error.message)
        for state in self._states():
            if isinstance(state, Notice):
                yield state
                continue
            try:
                yield from self._driver_events(state)
            except UNREADABLE as error:
                if error.message != unread:
                    unread = error.message
                    yield _unread(unread)
            seen = (state.phase, state.attempt, state.reason, state.deleting)
            if seen != reported:
                reported = seen
                yield state.notice()
            found = self.troubles(state)
            if found != shown:
                shown = found
                yield from (_trouble(line) for line in found)
            if state.phase.is_over:
                self._end = state
                return
            neglected = unchanging(state, self._timing.clock.now() - began, self._timing.patience)
            if neglected is not None:
                raise neglected

    def _driver_events(self, state: State) -> list[Event]:
        events = self._progress.poll(state.attempt) if self._progress is not None else []
        for event in events:
            if isinstance(event, (Published, Errored)):
                self._last_word = event
            elif isinstance(event, Planned):
                self._last_word = None
        return events

    def _states(self) -> Iterator[State | Notice]:
        """Yield the RayJob's states, repeating the last at least once per window; a notice when the API does not answer."""
        timing, known = self._timing, False
        patience = Patience(timing.clock, timing.patience)
        while True:
            try:
                job = self._api.get(RAY_JOB, self.namespace, self.id)
                if job is None and not known:
                    raise self._unknown()
                patience.answered()
                known = True
                while job is not None:
                    yield state_of(job)
                    for changed in self._changes(job, timing.window):
                        job = changed
                        if changed is not None:
                            yield state_of(changed)
                raise CancelledError(f"{self.id} was deleted while it ran")
            except ExpiredError:
                continue
            except UnreachableError as error:
                patience.failed(error)
                yield _trouble(error.message)
                timing.clock.sleep(timing.backoff)

    def _changes(self, job: Fields, seconds: float) -> Iterator[Fields | None]:
        """Yield the RayJob's changes within `seconds`; None when it is deleted. Raises ExpiredError."""
        for changed in self._api.watch(RAY_JOB, self.namespace, self.id, str(at(job, "metadata.resourceVersion")), seconds):
            yield changed
            if changed is None:
                return

    def result(self) -> Published:
        """See Followed. Raises NotStartedError and DeadlineError too."""
        if self._end is None:
            for _ in self.events():
                pass
        assert self._end is not None
        error = failure(self._end, self._last_word)
        if error is not None:
            raise error
        return Published(manifest=f"{self._end.release}/manifest.json")

    def cancel(self) -> State:
        """Delete the RayJob and wait until it is gone: the operator stops the driver and removes the pods.

        Returns the state before. Raises UnknownSubmissionError, ClusterError when the RayJob is not removed in time.
        """
        state = self.status()
        self._api.delete(RAY_JOB, self.namespace, self.id)
        self.wait_until_gone()
        return state

    def wait_until_gone(self) -> None:
        """Wait until a RayJob that is being deleted is gone. Raises ClusterError."""
        timing = self._timing
        began = timing.clock.now()
        while (job := self._api.get(RAY_JOB, self.namespace, self.id)) is not None:
            if timing.clock.now() - began >= timing.patience:
                raise ClusterError(
                    f"RayJob {self.id} is still being deleted after {timing.patience:.0f} s",
                    "Check that the KubeRay operator runs: it ends the driver, then lets the RayJob go.",
                )
            with contextlib.suppress(ExpiredError):
                if None in self._changes(job, min(timing.window, timing.patience)):
                    return

    def _unknown(self) -> UnknownSubmissionError:
        return UnknownSubmissionError(
            f"there is no RayJob {self.id} in namespace {self.namespace}",
            "`orchestrator k8s list -n NAMESPACE` shows its builds.",
        )


def _trouble(message: str) -> Notice:
    return Notice("trouble", message, {"message": message})


def _unread(reason: str) -> Notice:
    return _trouble(f"the driver's events are not seen from here: {reason}")
