"""Remove unneeded objects from a store: outcomes and outputs of no release, objects of no manifest, dead uploads.

Always kept: a manifest's files, the outcomes of its steps, their outputs, and tags. Kept while it runs: everything that a live
build has announced (commits.in_use). Anything else, events of ended builds too, is removed once it was found unneeded twice, at
least the grace period apart. Ages count from the first of these looks, recorded in collect/seen.json. A store's own dates mean
little, since a fresh copy or hard link may carry the date of its source.

An error in listing or reading ends `collect` before it deletes anything. A damaged or newer manifest or announcement may need any
step: then no outcome and no output is deleted, and nothing beside it among the releases.

A build may begin at any moment. It announces itself before it looks up outcomes. This module deletes outcomes first, reads the
announcements again, puts back the outcomes that a new build may have seen, and only then deletes outputs.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import ValidationError

from orchestrator.base.digest import digest_bytes
from orchestrator.base.errors import DigestError, SchemaVersionError, SpecError
from orchestrator.planning.steps import Outcome
from orchestrator.releases.listing import RELEASES
from orchestrator.releases.manifest import MANIFEST, Manifest, parse_manifest, signature_key
from orchestrator.scheduling.commits import ASIDE, EVENTS, LIVE, OUTCOMES, STEPS, LiveBuild, outcome_key
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import open_store
from orchestrator.stores.store import ObjectExistsError, ObjectMissingError, Store, Upload, check_present

GRACE = datetime.timedelta(days=7)
"""Default grace period: longer than the longest build."""
_LONGEST_GRACE = datetime.timedelta(days=36_500)
SEEN = "collect/seen.json"
_LISTED = (OUTCOMES, STEPS, RELEASES, LIVE, EVENTS, ASIDE)
_UPLOADED = (*_LISTED, "tags/", "collect/", "probes/")
"""Prefixes of everything that is ever written. Other folders beside them are not ours to look into."""


@dataclass
class Collected:
    """Findings about a store."""

    due: dict[str, int] = field(default_factory=dict)
    """Bytes of the keys to delete, or deleted."""
    waiting: dict[str, int] = field(default_factory=dict)
    """Bytes of the keys that are unneeded, but not for long enough."""
    uploads: list[Upload] = field(default_factory=list)
    """Unfinished uploads begun before the grace period."""
    unreadable: list[str] = field(default_factory=list)
    """Manifests and announcements that cannot be understood: because of them no outcome and no output is due."""
    deleted: bool = False


@dataclass(frozen=True)
class _Live:
    """Running builds, by the key of their announcement."""

    builds: dict[str, LiveBuild]
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class _Roots:
    """Objects that must stay."""

    digests: frozenset[str]
    """Digests of steps whose outcomes stay."""
    keys: frozenset[str]
    """Keys of releases' objects."""
    releases: tuple[str, ...]
    """Key prefixes of releases that a live build will publish, or whose manifest cannot be read."""
    unreadable: tuple[str, ...]
    """Keys of unreadable manifests."""


def collect(
    url: str,
    grace: datetime.timedelta = GRACE,
    *,
    delete: bool = False,
    options: StoreOptions | None = None,
    now: datetime.datetime | None = None,
) -> Collected:
    """Find unneeded objects in the store at `url`, and delete those that are due if `delete`.

    A live build announced longer ago than `grace` counts as dead, so `grace` must exceed the longest build. `now` is UTC. Raises
    StoreError for a missing store and, before anything is deleted, when a part cannot be listed or read; SpecError for a grace
    period of more than a century.
    """
    if not datetime.timedelta(0) <= grace <= _LONGEST_GRACE:
        raise SpecError(f"grace period of {grace.days:,} days", f"Give a number of days from 0 to {_LONGEST_GRACE.days:,}.")
    store = open_store(url, options)
    check_present(store)
    moment = now or datetime.datetime.now(datetime.UTC)
    found = Collected(deleted=delete)
    present = {info.key: info.num_bytes for top in _LISTED for info in store.list(top)}
    found.uploads = [up for top in _UPLOADED for up in store.list_uploads(top) if up.started_at <= moment - grace]
    seen = _read_seen(store)
    live = _live(store, moment - grace)
    outcomes = _outcomes(store, present)
    roots = _roots(store, present, live.builds.values())
    believed = [key for key in live.unreadable if seen.get(key, moment) > moment - grace]
    found.unreadable = [*roots.unreadable, *believed]
    needed = _needed(present, outcomes, roots, live.builds)
    if found.unreadable:
        needed |= {key for key in present if key.startswith((OUTCOMES, STEPS)) or (believed and key.startswith(RELEASES))}
    first_seen = {key: seen.get(key, moment) for key in present if key not in needed}
    for key, since in sorted(first_seen.items()):
        (found.due if since <= moment - grace else found.waiting)[key] = present[key]
    if delete:
        _delete(store, found, outcomes, moment - grace)
        first_seen = {key: since for key, since in first_seen.items() if key not in found.due}
    store.put(SEEN, json.dumps({key: since.isoformat() for key, since in first_seen.items()}).encode())
    return found


def _needed(present: Iterable[str], outcomes: dict[str, Outcome], roots: _Roots, live: dict[str, LiveBuild]) -> set[str]:
    """Return the keys that stay."""
    needed = set(roots.keys) | set(live)
    kept = {digest for build in live.values() for digest in build.steps}
    for digest in roots.digests:
        needed.add(outcome_key(digest))
        if digest in outcomes:
            needed |= _of_outcome(outcomes[digest])
        else:  # this program cannot read the outcome, but another one can
            kept.add(digest)
    for key in present:
        # An attempt of a live build's step writes outputs before any outcome names them.
        in_attempt = key.startswith(STEPS) and key.split("/")[1] in kept
        in_run = key.startswith(EVENTS) and key.split("/")[1] in {build.build_key for build in live.values()}
        if in_attempt or in_run or key.startswith(roots.releases):
            needed.add(key)
    return needed


def _of_outcome(outcome: Outcome) -> set[str]:
    return {outcome_key(outcome.digest), *(output.key for output in outcome.outputs), *([outcome.log] if outcome.log else [])}


def _delete(store: Store, found: Collected, outcomes: dict[str, Outcome], oldest: datetime.datetime) -> None:
    """Delete what is due. Objects that a build needs which began meanwhile are removed from `found.due`."""
    removed = {key: store.get(key) for key in found.due if key.startswith(OUTCOMES)}
    for key in removed:
        store.delete(key)
    live = _live(store, oldest)
    if set(live.unreadable) - found.due.keys() - found.waiting.keys():  # a newer program's build has begun meanwhile
        for key, data in removed.items():
            _put_back(store, key, data)
        found.due.clear()
    for build in live.builds.values():
        for digest in build.steps:
            if outcome_key(digest) in removed:
                _put_back(store, outcome_key(digest), removed[outcome_key(digest)])
            spared = _of_outcome(outcomes[digest]) if digest in outcomes else {outcome_key(digest)}
            found.due = {key: size for key, size in found.due.items() if key not in spared and f"/{digest}/" not in key}
        if build.release:
            found.due = {key: size for key, size in found.due.items() if not key.startswith(build.release)}
    for key in found.due:
        store.delete(key)
    for upload in found.uploads:
        store.abort_upload(upload)


def _put_back(store: Store, key: str, data: bytes) -> None:
    with contextlib.suppress(ObjectExistsError):  # the build ran the step again, and its outcome counts
        store.put(key, data, create=True)


def _live(store: Store, oldest: datetime.datetime) -> _Live:
    """Return the builds announced since `oldest`, by key."""
    found, unreadable = {}, []
    for info in list(store.list(LIVE)):
        try:
            build = LiveBuild.model_validate_json(store.get(info.key))
        except ObjectMissingError:  # its build has ended
            continue
        except ValidationError:
            unreadable.append(info.key)
            continue
        if build.started_at > oldest:
            found[info.key] = build
    return _Live(found, tuple(unreadable))


def _outcomes(store: Store, present: Iterable[str]) -> dict[str, Outcome]:
    """Return the outcomes by digest, without unreadable ones."""
    found = {}
    for key in present:
        if key.startswith(OUTCOMES):
            try:
                outcome = Outcome.model_validate_json(store.get(key))
            except (ObjectMissingError, ValidationError):
                continue
            if key == outcome_key(outcome.digest):
                found[outcome.digest] = outcome
    return found


def _roots(store: Store, present: Iterable[str], live: Iterable[LiveBuild]) -> _Roots:
    digests: set[str] = set()
    keys: set[str] = set()
    releases: list[str] = []
    unreadable: list[str] = []
    for build in live:
        digests.update(build.steps)
        releases.extend([build.release] if build.release else [])
    for key in present:
        if not (key.startswith(RELEASES) and key.endswith("/" + MANIFEST) and key.count("/") == 3):
            continue
        folder = key.removesuffix(MANIFEST)
        manifest, digest = _manifest(store, key)
        if manifest is None:
            releases.append(folder)
            unreadable.append(key)
            continue
        digests.update(manifest.steps.values())
        keys.update([key, folder + signature_key(digest), *(folder + file.key for file in manifest.all_files())])
    return _Roots(frozenset(digests), frozenset(keys), tuple(releases), tuple(unreadable))


def _manifest(store: Store, key: str) -> tuple[Manifest | None, str]:
    try:
        data = store.get(key)
        return parse_manifest(data, key), digest_bytes(data)
    except (ObjectMissingError, DigestError, SchemaVersionError):
        return None, ""


def _read_seen(store: Store) -> dict[str, datetime.datetime]:
    """Return when each key was first found unneeded; empty when the record is missing or damaged."""
    try:
        plain = json.loads(store.get(SEEN))
        return {str(key): datetime.datetime.fromisoformat(since) for key, since in plain.items()}
    except (ObjectMissingError, ValueError, TypeError, AttributeError):
        return {}
