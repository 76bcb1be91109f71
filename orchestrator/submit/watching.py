"""A build looked at through its store, live or ended: which runs there are, and their events in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.base.errors import ReleaseAddressError, ReleaseMissingError
from orchestrator.events.builds import BuildEvent, LogReader, Planned, Published, conclude
from orchestrator.releases.manifest import MANIFEST, address_parts, parse_manifest, release_prefix
from orchestrator.report.journal import ALIVE_SECONDS, segment_key
from orchestrator.run.commits import EVENTS
from orchestrator.stores.store import ObjectMissingError, Store

PATIENCE_SECONDS = 6 * ALIVE_SECONDS
"""A driver that is silent for so long is lost, by the clocks of both machines."""
_LOOK_SECONDS = 1.0
_ADVICE = "Somebody has written to the store what no build did: do not trust these events."


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a build."""

    prefix: str
    """Of its keys."""
    build_key: str


def list_runs(store: Store) -> list[Run]:
    """Of all builds whose events the store still has, the newest first."""
    prefixes = {info.key.rpartition("/")[0] for info in store.list(EVENTS)}
    found = [Run(prefix + "/", prefix.split("/")[1]) for prefix in prefixes if prefix.count("/") == 2]
    return sorted(found, key=lambda run: run.prefix.split("/")[2], reverse=True)


def find_run(store: Store, release: str = "", build: str = "") -> Run:
    """The newest run, of a release (name, or name/version) or of a build whose key begins so. Raises ReleaseMissingError."""
    for run in list_runs(store):
        if run.build_key.startswith(build) and (not release or _is_of(_planned_release(store, run), release)):
            return run
    what = release or build
    raise ReleaseMissingError(
        f"{store.url} has no events of {f'a build of {what}' if what else 'any build'}",
        "A build writes them from its first step on; `orchestrator collect` removes old ones.",
    )


def _is_of(planned: str, release: str) -> bool:
    return planned == release or planned.partition("/")[0] == release


def _planned_release(store: Store, run: Run) -> str:
    try:
        events = LogReader().feed(store.get(segment_key(run.prefix, 0)).decode())
    except ObjectMissingError:
        return ""
    return next((event.release for event in events if isinstance(event, Planned)), "")


class Watch:
    """Follows one run to its end."""

    def __init__(
        self, store: Store, run: Run, clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._store = store
        self._run = run
        self._clock = clock
        self._sleep = sleep
        self._reader = LogReader()
        self._heard = 0.0
        self._release = ""
        """Name and version that the run was going to publish."""

    def events(self) -> Iterator[BuildEvent]:
        """What happened and, while the build runs, what happens; ends with it, or when its driver is silent for too long."""
        number = 0
        while self._reader.last_word is None:
            try:
                text = self._store.get(segment_key(self._run.prefix, number)).decode()
            except ObjectMissingError:
                if self._heard and self._clock() - self._heard > PATIENCE_SECONDS:
                    return
                self._heard = self._heard or self._clock()
                self._sleep(_LOOK_SECONDS)
                continue
            number += 1
            for event in self._reader.feed(text):
                self._heard = max(self._heard, event.at)
                self._check(event)
                yield event

    def _check(self, event: BuildEvent) -> None:
        """Raises ReleaseAddressError when the events are those of another build, or name another release than they planned."""
        where = f"{self._store.url}/{self._run.prefix}"
        if isinstance(event, Planned):
            self._release = event.release
            if event.build_key != self._run.build_key:
                raise ReleaseAddressError(f"{where} holds the events of build {event.build_key[:12]}", _ADVICE)
        elif isinstance(event, Published) and self._release:
            found = "/".join(address_parts(event.manifest) or ())
            if found != self._release:
                raise ReleaseAddressError(f"{where} names {event.manifest} as its release, planned was {self._release}", _ADVICE)

    def conclusion(self) -> Published:
        """Outcome of the build. Raises its own error, DriverLostError, or ReleaseAddressError for a manifest put in its place."""
        reason = f"nothing was heard of it for {self._clock() - self._heard:.0f} s"
        where = f"build {self._run.build_key[:12]}"
        made = conclude(self._reader.last_word, stopped=False, where=where, reason=reason)
        self._check_manifest(made)
        return made

    def _check_manifest(self, made: Published) -> None:
        """Check that the address holds that build's release, or nothing: a release may be deleted, never replaced."""
        parts = address_parts(made.manifest)
        key = release_prefix(*parts) + MANIFEST if parts else ""
        try:
            data = self._store.get(key) if key else b""
        except ObjectMissingError:
            return
        if data:
            build_key = parse_manifest(data, f"{self._store.url}/{key}").build_key
            if build_key != self._run.build_key:
                raise ReleaseAddressError(
                    f"{made.manifest} is that of build {build_key[:12]} now, not of {self._run.build_key[:12]}"
                )
