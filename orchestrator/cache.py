"""Where a step's outputs live in a store, and which digests are committed.

    steps/<digest>/<attempt>/<name>     outputs; the attempt's random name keeps a lost worker's late writes apart
    outcomes/<digest>.json              the commit: written last, put-if-absent, names the outputs
    live/<id>.json                      a build that runs: what it counts on, so that nothing of it is collected
    events/<build key>/<run>/...        what a run of a build has said: report/journal.py

There is no state file and no lock: a committed outcome under a digest is never computed again.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.core.errors import StoreError
from orchestrator.core.step import Outcome
from orchestrator.stores import ObjectExistsError, ObjectMissingError, Store

OUTCOMES, STEPS, LIVE, EVENTS = "outcomes/", "steps/", "live/", "events/"
_LOOKUP_THREADS = 16
_LOOKS, _DYING_SECONDS = 3, 0.5
"""What a killed worker may take to be dead, and a store to show the upload that it began last."""


class LiveBuild(BaseModel):
    """What a running build says of itself before it looks up what is committed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    started_at: datetime.datetime
    """UTC."""
    steps: tuple[str, ...]
    """Digests: their outcomes and outputs are in use."""
    release: str | None = None
    """Key prefix that it is going to publish under; None: it publishes nothing."""
    build_key: str | None = None
    """Its events are being written."""


def outcome_key(digest: str) -> str:
    """Where the commit of a step stands."""
    return f"{OUTCOMES}{digest}.json"


def attempt_prefix(digest: str, attempt: str) -> str:
    """Where one attempt writes its outputs; ends with '/'."""
    return f"{STEPS}{digest}/{attempt}/"


def commit(store: Store, outcome: Outcome) -> Outcome:
    """Commit `outcome`, or return the one that another attempt has committed before."""
    data = outcome.model_dump_json(indent=1).encode()
    try:
        store.put(outcome_key(outcome.digest), data, create=True)
    except ObjectExistsError:
        winner = lookup(store, outcome.digest)
        if winner is not None:
            return winner
        # The committed outcome lost its outputs: ours replaces it.
        store.put(outcome_key(outcome.digest), data)
    return outcome


def lookup(store: Store, digest: str) -> Outcome | None:
    """The committed outcome of a step; None when there is none or its outputs are gone."""
    try:
        outcome = Outcome.model_validate_json(store.get(outcome_key(digest)))
    except (ObjectMissingError, ValidationError):
        return None
    intact = all(store.size(output.key) == output.num_bytes for output in outcome.outputs)
    return outcome if intact else None


def find(store: Store, digest: str) -> Outcome | None:
    """As `lookup`; None also while the store cannot be reached."""
    try:
        return lookup(store, digest)
    except StoreError:
        return None


def committed(store: Store, digests: Iterable[str]) -> dict[str, Outcome]:
    """The committed outcomes among `digests`."""
    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        found = pool.map(lambda digest: lookup(store, digest), list(digests))
        return {outcome.digest: outcome for outcome in found if outcome is not None}


@contextlib.contextmanager
def in_use(store: Store, digests: Iterable[str], release: str | None = None, build_key: str | None = None) -> Iterator[None]:
    """Announce a build as long as the block runs. A killed one stays announced until `collect` finds it too old to be true."""
    key = f"{LIVE}{uuid.uuid4().hex}.json"
    began = datetime.datetime.now(datetime.UTC)
    live = LiveBuild(started_at=began, steps=tuple(digests), release=release, build_key=build_key)
    store.put(key, live.model_dump_json().encode())
    try:
        yield
    finally:
        with contextlib.suppress(StoreError):  # what the build came to matters more
            store.delete(key)


@contextlib.contextmanager
def nothing_left_begun(store: Store, build_id: str) -> Iterator[None]:
    """When the block ends by an exception, Ctrl-C too, remove the unfinished uploads of attempts whose names begin with `build_id`.

    The workers of such a block were killed and could not. Around the block that closes the cluster, never inside it.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(StoreError):  # why the block ended matters more
            abort_attempts(store, build_id)
        raise


def abort_attempts(store: Store, build_id: str, sleep: Callable[[float], None] = time.sleep) -> None:
    """Remove the unfinished uploads of one run of a build. Looks more than once: a killed worker may just be dying."""
    for look in range(_LOOKS):
        if look:
            sleep(_DYING_SECONDS)
        begun = [upload for upload in store.list_uploads(STEPS) if _attempt_of(upload.key).startswith(build_id)]
        for upload in begun:
            store.abort_upload(upload)


def _attempt_of(key: str) -> str:
    parts = key.split("/")
    return parts[2] if len(parts) > 3 else ""
