"""Layout of steps in a store, and the commits of their outcomes.

    steps/<digest>/<attempt>/<name>     outputs; the attempt's random name keeps a lost worker's late writes apart
    outcomes/<digest>.json              the commit: written last, put-if-absent, names the outputs
    aside/<digest>.json                 a commit with damaged outputs, and the reason; .outdated.json: made from other bytes
    live/<id>.json                      a running build and the outputs that `collect` must not remove
    events/<build key>/<run>/...        events of one run of a build: report/journal.py

There is no state file and no lock: a committed outcome under a digest is never computed again.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.base.errors import SourceCorruptError, StoreError
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.scheduling.consumption import outdated
from orchestrator.scheduling.schedule import TakenBack
from orchestrator.stores.store import ObjectExistsError, ObjectMissingError, Store

OUTCOMES, STEPS, LIVE, EVENTS, ASIDE = "outcomes/", "steps/", "live/", "events/", "aside/"
_LOOKUP_THREADS = 16
_LOOKS, _DYING_SECONDS = 3, 0.5
"""Rounds of looking for unfinished uploads, and the pause between: a killed worker may still be dying."""


class LiveBuild(BaseModel):
    """Record of a running build, written before it looks up committed outcomes."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    started_at: datetime.datetime
    """Start time in UTC."""
    steps: tuple[str, ...]
    """Digests of the steps whose outcomes and outputs are in use."""
    release: str | None = None
    """Key prefix of the release to publish. None: publishes nothing."""
    build_key: str | None = None
    """Key of the build whose events are being written. None: none are."""


class Aside(BaseModel):
    """A commit that no longer counts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    outcome: Outcome
    reason: str
    at: datetime.datetime


def outcome_key(digest: str) -> str:
    """Return the key of a step's commit."""
    return f"{OUTCOMES}{digest}.json"


def aside_key(digest: str, *, damaged: bool) -> str:
    """Return the key under which a commit is set aside."""
    return f"{ASIDE}{digest}.json" if damaged else f"{ASIDE}{digest}.outdated.json"


def attempt_prefix(digest: str, attempt: str) -> str:
    """Return the key prefix of one attempt's outputs, with a trailing '/'."""
    return f"{STEPS}{digest}/{attempt}/"


def commit(store: Store, outcome: Outcome) -> Outcome:
    """Commit `outcome`, or return the outcome that another attempt committed first."""
    data = outcome.model_dump_json(indent=1).encode()
    try:
        store.put(outcome_key(outcome.digest), data, create=True)
    except ObjectExistsError:
        winner = lookup(store, outcome.digest)
        if winner is not None:
            return winner
        # The committed outcome has lost its outputs: ours replaces it.
        store.put(outcome_key(outcome.digest), data)
    return outcome


def lookup(store: Store, digest: str) -> Outcome | None:
    """Return the committed outcome of a step; None when it is missing or its outputs are gone."""
    try:
        outcome = Outcome.model_validate_json(store.get(outcome_key(digest)))
    except (ObjectMissingError, ValidationError):
        return None
    intact = all(store.size(output.key) == output.num_bytes for output in outcome.outputs)
    return outcome if intact else None


def set_aside(store: Store, taken: TakenBack) -> None:
    """Move a commit that no longer counts to another key, so that its step can run again.

    A commit that another build has replaced meanwhile stays. The outputs stay until `collect` removes them as unneeded.
    """
    outcome = taken.outcome
    key = outcome_key(outcome.digest)
    try:
        current = Outcome.model_validate_json(store.get(key))
    except ObjectMissingError:
        return
    except ValidationError:
        current = None
    if current is not None and current.model_dump_json() != outcome.model_dump_json():
        return
    record = Aside(outcome=outcome, reason=taken.reason, at=datetime.datetime.now(datetime.UTC))
    store.put(aside_key(outcome.digest, damaged=taken.damaged), record.model_dump_json(indent=1).encode())
    store.delete(key)


def agreeing(store: Store, plan: Plan) -> tuple[Plan, dict[str, Outcome]]:
    """Return the plan's committed outcomes. Those made from other bytes than the rest are set aside, of which the plan warns."""
    kept, warnings = committed(store, (step.digest for step in plan.steps)), []
    while reasons := outdated(plan, kept):
        for digest, reason in reasons.items():
            set_aside(store, TakenBack(kept.pop(digest), reason, damaged=False))
            warnings.append(f"{reason}: it runs again")
    return replace(plan, warnings=(*plan.warnings, *warnings)), kept


def check_same_again(store: Store, outcome: Outcome) -> None:
    """Compare the outputs of a repeated conversion with the damaged first ones: the same source must give the same bytes.

    Raises SourceCorruptError when they differ although the digest says that the source is the same.
    """
    if outcome.kind is not Kind.CONVERT:
        return
    key = aside_key(outcome.digest, damaged=True)
    try:
        first = Aside.model_validate_json(store.get(key)).outcome
    except (ObjectMissingError, ValidationError):
        return
    written = {output.name: output.sha256 for output in first.outputs}
    others = [output.name for output in outcome.outputs if output.sha256 != written.get(output.name, output.sha256)]
    if others and first.consumed == outcome.consumed:
        raise SourceCorruptError(
            f"{outcome.name} wrote another {', '.join(others[:3])} than the first time, although the source's files look the "
            "same: the source was damaged or changed since",
            "Compare the source with the publisher's checksums and download what differs. If the source is right now, delete "
            f"{key} from the store.",
        )


def find(store: Store, digest: str) -> Outcome | None:
    """Return what `lookup` does; None also while the store cannot be reached."""
    try:
        return lookup(store, digest)
    except StoreError:
        return None


def committed(store: Store, digests: Iterable[str]) -> dict[str, Outcome]:
    """Return the committed outcomes among `digests`, by digest."""
    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        found = pool.map(lambda digest: lookup(store, digest), list(digests))
        return {outcome.digest: outcome for outcome in found if outcome is not None}


@contextlib.contextmanager
def in_use(store: Store, digests: Iterable[str], release: str | None = None, build_key: str | None = None) -> Iterator[None]:
    """Announce a build while the block runs. The announcement of a killed build stays until `collect` finds it too old."""
    key = f"{LIVE}{uuid.uuid4().hex}.json"
    began = datetime.datetime.now(datetime.UTC)
    live = LiveBuild(started_at=began, steps=tuple(digests), release=release, build_key=build_key)
    store.put(key, live.model_dump_json().encode())
    try:
        yield
    finally:
        with contextlib.suppress(StoreError):  # the build's own result or error matters more
            store.delete(key)


@contextlib.contextmanager
def nothing_left_begun(store: Store, build_id: str) -> Iterator[None]:
    """Remove the unfinished uploads of a build's attempts when the block raises, on Ctrl-C too.

    Its workers were killed and cannot do so. `build_id` begins the names of its attempts. Wrap the block that closes the cluster.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(StoreError):  # the error that ended the block matters more
            abort_attempts(store, build_id)
        raise


def abort_attempts(store: Store, build_id: str) -> None:
    """Remove the unfinished uploads of one run of a build. Looks several times, because a killed worker may still be dying."""
    for look in range(_LOOKS):
        if look:
            time.sleep(_DYING_SECONDS)
        begun = [upload for upload in store.list_uploads(STEPS) if _attempt_of(upload.key).startswith(build_id)]
        for upload in begun:
            store.abort_upload(upload)


def _attempt_of(key: str) -> str:
    parts = key.split("/")
    return parts[2] if len(parts) > 3 else ""
