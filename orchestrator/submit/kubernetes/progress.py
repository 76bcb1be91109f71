"""Events of a driver on Kubernetes. The driver writes them to the store, so that nobody needs access to its pods."""

from __future__ import annotations

import datetime

from orchestrator.base.errors import (
    AuthenticationError,
    OrchestratorError,
    ReleaseAddressError,
    ReleaseMissingError,
    SpecError,
    StoreError,
    ToolError,
)
from orchestrator.events import Event
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.spec.decoding import decode_yaml
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.submit.bundle import CLUSTER_FILE, SPEC_FILE
from orchestrator.submit.kubernetes.api import RAY_JOB, Kind, KubernetesApi
from orchestrator.submit.kubernetes.manifests import Fields, at
from orchestrator.submit.watching import Run, RunReader, find_run

_ATTEMPTS, _READ_SECONDS = 2, 10.0
"""Limits of a request to the store: a follower must not wait for minutes."""
UNREADABLE: tuple[type[OrchestratorError], ...] = (AuthenticationError, ReleaseAddressError, SpecError, StoreError, ToolError)
"""Errors that make a driver's events unreadable from here; the build's end is visible all the same."""


class StoreProgress:
    """The driver's events. Every attempt's driver writes a run; the newest run is followed."""

    def __init__(self, store: Store, release: str, since: str) -> None:
        """`release`: name/version; `since`: the RayJob's creationTimestamp. Earlier runs belong to other builds."""
        self._store, self._release = store, release
        self._since = _moment(since)
        self._reader: RunReader | None = None
        self._attempt = 0

    def poll(self, attempt: int) -> list[Event]:
        """Return new events. `attempt` is the RayJob's, from 1. Raises StoreError, ReleaseAddressError."""
        found = self._reader.read() if self._reader is not None else []
        if self._reader is None or self._reader.last_word is not None or attempt != self._attempt:
            run = self._newest()
            if run is not None and (self._reader is None or run != self._reader.run):
                self._reader, self._attempt = RunReader(self._store, run), attempt
                found += self._reader.read()
        return found

    def _newest(self) -> Run | None:
        try:
            run = find_run(self._store, self._release)
        except ReleaseMissingError:
            return None
        return run if _moment(run.prefix.split("/")[2].partition("-")[0]) >= self._since else None


def _moment(text: str) -> datetime.datetime:
    """Return the Unix time of 2026-01-01T00:00:00Z, or 20260101T000000Z."""
    return datetime.datetime.fromisoformat(text)


def progress_of(api: KubernetesApi, namespace: str, name: str) -> StoreProgress | None:
    """Return the source of a build's events, from the bundle in the cluster; None when the bundle is missing.

    Raises SpecError for a bundle of another version, StoreError for a store that cannot be opened here, and KubernetesApi's errors.
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
