"""Watch a build through its store, live or ended: find its runs, and read their events in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.base.errors import ReleaseAddressError, ReleaseMissingError
from orchestrator.events import Errored, Event, Planned, Published
from orchestrator.events.log import LogReader, conclude
from orchestrator.releases.manifest import MANIFEST, address_parts, parse_manifest, release_prefix
from orchestrator.report.journal import HEARTBEAT_SECONDS, segment_key
from orchestrator.scheduling.commits import EVENTS
from orchestrator.stores.store import ObjectMissingError, Store

PATIENCE_SECONDS = 6 * HEARTBEAT_SECONDS
"""Silence after which a driver counts as lost, by the clocks of both machines."""
_LOOK_SECONDS = 1.0
_ADVICE = "Someone has changed the store: do not trust these events."


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a build."""

    prefix: str
    """Prefix of the run's keys in the store."""
    build_key: str


def list_runs(store: Store) -> list[Run]:
    """Return the runs of all builds with events in the store, newest first."""
    prefixes = {info.key.rpartition("/")[0] for info in store.list(EVENTS)}
    found = [Run(prefix + "/", prefix.split("/")[1]) for prefix in prefixes if prefix.count("/") == 2]
    return sorted(found, key=lambda run: run.prefix.split("/")[2], reverse=True)


def find_run(store: Store, release: str = "", build: str = "") -> Run:
    """Return the newest run of a release (name, or name/version) or of a build key's beginning. Raises ReleaseMissingError."""
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


class RunReader:
    """Events of one run, as far as the store has them."""

    def __init__(self, store: Store, run: Run) -> None:
        self.run = run
        self._store = store
        self._log = LogReader()
        self._number = 0
        self._release = ""
        """Name and version of the release that the run will publish."""

    @property
    def last_word(self) -> Published | Errored | None:
        return self._log.last_word

    def read(self) -> list[Event]:
        """Return new events.

        Raises StoreError; ReleaseAddressError for events of another build, or of another release than planned.
        """
        found: list[Event] = []
        while self.last_word is None:
            try:
                text = self._store.get(segment_key(self.run.prefix, self._number)).decode()
            except ObjectMissingError:
                break
            self._number += 1
            found += self._log.feed(text)
        for event in found:
            self._check(event)
        return found

    def _check(self, event: Event) -> None:
        where = f"{self._store.url}/{self.run.prefix}"
        if isinstance(event, Planned):
            self._release = event.release
            if event.build_key != self.run.build_key:
                raise ReleaseAddressError(f"{where} holds the events of build {event.build_key[:12]}", _ADVICE)
        elif isinstance(event, Published) and self._release:
            found = "/".join(address_parts(event.manifest) or ())
            if found != self._release:
                raise ReleaseAddressError(f"{where} names {event.manifest} as its release, planned was {self._release}", _ADVICE)


class Watch:
    """A build followed through its store: Followed of submit.protocol."""

    def __init__(
        self, store: Store, run: Run, clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._store, self._run, self._clock, self._sleep = store, run, clock, sleep
        self._reader = RunReader(store, run)
        self._heard = 0.0

    def events(self) -> Iterator[Event]:
        """Yield events until the build ends, or its driver is silent for too long."""
        while self._reader.last_word is None:
            found = self._reader.read()
            for event in found:
                self._heard = max(self._heard, event.time)
                yield event
            if found:
                continue
            if self._heard and self._clock() - self._heard > PATIENCE_SECONDS:
                return
            self._heard = self._heard or self._clock()
            self._sleep(_LOOK_SECONDS)

    def result(self) -> Published:
        """See Followed. Raises DriverLostError, and ReleaseAddressError when another release replaced its manifest."""
        for _ in self.events():
            pass
        reason = f"it was silent for {self._clock() - self._heard:.0f} s"
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
