"""The driver's own events of a build on Kubernetes: it writes them to the store, so that nobody has to reach into its pods."""

from __future__ import annotations

import datetime

from orchestrator.base.errors import ReleaseMissingError
from orchestrator.events.builds import BuildEvent, LogReader
from orchestrator.report.journal import segment_key
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode_yaml
from orchestrator.stores import open_store
from orchestrator.stores.store import ObjectMissingError, Store
from orchestrator.submit.kubernetes.api import RAY_JOB, Api, Kind
from orchestrator.submit.kubernetes.manifests import Fields, at
from orchestrator.submit.kubernetes.states import State
from orchestrator.submit.submission import CLUSTER_FILE, SPEC_FILE
from orchestrator.submit.watching import Run, find_run

_ATTEMPTS, _READ_SECONDS = 2, 10.0
"""Of a request to the store: who only looks on does not wait for minutes."""


class StoreProgress:
    """See orchestrator.submit.kubernetes.builds.Progress. Every attempt's driver is a run of its own; the newest is followed."""

    def __init__(self, store: Store, release: str, since: str) -> None:
        """`release` is name/version, `since` the RayJob's creationTimestamp: runs before it are others'."""
        self._store, self._release = store, release
        self._since = _moment(since)
        self._run: Run | None = None
        self._attempt = 0
        self._reader = LogReader()
        self._number = 0

    def poll(self, state: State) -> list[BuildEvent]:
        """Events that are new. Raises StoreError."""
        found = self._read()
        if self._run is None or self._reader.last_word is not None or state.attempt != self._attempt:
            newest = self._newest()
            if newest is not None and newest != self._run:
                self._run, self._attempt, self._reader, self._number = newest, state.attempt, LogReader(), 0
                found += self._read()
        return found

    def _newest(self) -> Run | None:
        try:
            run = find_run(self._store, self._release)
        except ReleaseMissingError:
            return None
        return run if _moment(run.prefix.split("/")[2].partition("-")[0]) >= self._since else None

    def _read(self) -> list[BuildEvent]:
        found: list[BuildEvent] = []
        while self._run is not None:
            try:
                text = self._store.get(segment_key(self._run.prefix, self._number)).decode()
            except ObjectMissingError:
                break
            self._number += 1
            found += self._reader.feed(text)
        return found


def _moment(text: str) -> datetime.datetime:
    """Of 2026-01-01T00:00:00Z, or 20260101T000000Z."""
    return datetime.datetime.fromisoformat(text)


def progress_of(api: Api, namespace: str, name: str) -> StoreProgress | None:
    """What a build's bundle in the cluster says of its store; None when it is not there.

    Raises the errors of Api, SpecError for a bundle of another version, StoreError for a store that cannot be opened here.
    """
    job = api.get(RAY_JOB, namespace, name)
    config = api.get(Kind("v1", "ConfigMap"), namespace, name)
    if job is None or config is None:
        return None
    place = decode_yaml(ClusterSpec, _file(config, CLUSTER_FILE), CLUSTER_FILE)
    spec = decode_yaml(BuildSpec, _file(config, SPEC_FILE), SPEC_FILE)
    options = place.store_options.model_copy(update={"max_attempts": _ATTEMPTS, "read_timeout_seconds": _READ_SECONDS})
    release = f"{spec.release.name}/{spec.release.version}"
    return StoreProgress(open_store(place.store, options), release, str(at(job, "metadata.creationTimestamp")))


def _file(config: Fields, name: str) -> str:
    return str(at(config, "data", {}).get(name, ""))
