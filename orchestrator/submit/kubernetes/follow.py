"""A build on Kubernetes followed to its end: its states, its driver's events, why its pods do not run. The API is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.base.errors import CancelledError, StoreError, UnreachableError
from orchestrator.events.builds import BuildEvent, Errored, Planned, Published
from orchestrator.submit.kubernetes.api import RAY_JOB, Api, ExpiredError
from orchestrator.submit.kubernetes.builds import Timing, pod_troubles, unknown
from orchestrator.submit.kubernetes.manifests import at
from orchestrator.submit.kubernetes.states import State, failure, state_of, unchanging


class Progress(Protocol):
    """Where the driver's own events come from."""

    def poll(self, state: State) -> list[BuildEvent]:
        """Those that are new. Raises StoreError."""
        ...


class Listener(Protocol):
    """Told of everything that is seen, in order."""

    def on_state(self, state: State) -> None:
        """Its phase, attempt or message changed."""
        ...

    def on_event(self, event: BuildEvent) -> None: ...

    def on_trouble(self, lines: list[str]) -> None:
        """Why pods do not run, or the API server does not answer."""
        ...


def follow(
    api: Api, namespace: str, name: str, listener: Listener, progress: Progress | None = None, timing: Timing | None = None
) -> State:
    """Watch a build to its end; returns its last state.

    Raises the build's own error, CancelledError when it is stopped or deleted meanwhile, NotStartedError, DeadlineError,
    DriverLostError, UnknownSubmissionError, and the errors of Api when they last longer than the patience.
    """
    timing = timing or Timing()
    heard = _Heard(listener, progress)
    watched = _Watched(api, namespace, listener, timing.now())
    for state in _states(api, namespace, name, listener, timing):
        if state is None:
            raise CancelledError(f"{name} was deleted while it ran")
        heard.listen(state)  # before the end is told
        watched.see(state)
        if state.phase.is_over:
            error = failure(state, heard.last_word)
            if error is not None:
                raise error
            return state
        neglected = unchanging(state, timing.now() - watched.began, timing.patience)
        if neglected is not None:
            raise neglected
    raise AssertionError("states end with an end")


@dataclass
class _Heard:
    """The driver's events so far."""

    listener: Listener
    progress: Progress | None
    last_word: Published | Errored | None = None
    """Of the attempt that is under way."""
    trouble: str = ""

    def listen(self, state: State) -> None:
        try:
            events = self.progress.poll(state) if self.progress is not None else []
        except StoreError as error:  # whoever may not read the store still sees the build's end
            if error.message != self.trouble:
                self.trouble = error.message
                self.listener.on_trouble([f"the driver's events are not seen from here: {error.message}"])
            return
        for event in events:
            if isinstance(event, (Published, Errored)):
                self.last_word = event
            elif isinstance(event, Planned):
                self.last_word = None
            self.listener.on_event(event)


@dataclass
class _Watched:
    """What was told of a build so far: nothing is told twice."""

    api: Api
    namespace: str
    listener: Listener
    began: float
    told: tuple[object, ...] = ()
    troubles: list[str] = field(default_factory=list)

    def see(self, state: State) -> None:
        seen = (state.phase, state.attempt, state.reason, state.deleting)
        if seen != self.told:
            self.told = seen
            self.listener.on_state(state)
        found = pod_troubles(self.api, self.namespace, state) if not state.phase.is_over else []
        if found != self.troubles:
            self.troubles = found
            if found:
                self.listener.on_trouble(found)


def _states(api: Api, namespace: str, name: str, listener: Listener, timing: Timing) -> Iterator[State | None]:
    """The states of a RayJob, the same again at least once in each window; None at last when it is deleted."""
    lost_at, known = None, False
    while True:
        try:
            job = api.get(RAY_JOB, namespace, name)
            if job is None and not known:
                raise unknown(namespace, name)
            lost_at, known = None, True
            while job is not None:
                yield state_of(job)
                version = str(at(job, "metadata.resourceVersion"))
                for job in api.watch(RAY_JOB, namespace, name, version, timing.window):
                    if job is None:
                        break
                    yield state_of(job)
            yield None
            return
        except ExpiredError:
            continue
        except UnreachableError as error:
            lost_at = timing.now() if lost_at is None else lost_at
            if timing.now() - lost_at >= timing.patience:
                raise
            listener.on_trouble([error.message])
            timing.sleep(timing.backoff)
