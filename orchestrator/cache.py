"""Where a step's outputs live in a store, and which digests are committed.

    steps/<digest>/<attempt>/<name>     outputs; the attempt's random name keeps a lost worker's late writes apart
    outcomes/<digest>.json              the commit: written last, put-if-absent, names the outputs

There is no state file and no lock: a committed outcome under a digest is never computed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError

from orchestrator.core.step import Outcome
from orchestrator.stores import ObjectExistsError, ObjectMissingError, Store

_LOOKUP_THREADS = 16


def outcome_key(digest: str) -> str:
    """Where the commit of a step stands."""
    return f"outcomes/{digest}.json"


def attempt_prefix(digest: str, attempt: str) -> str:
    """Where one attempt writes its outputs; ends with '/'."""
    return f"steps/{digest}/{attempt}/"


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


def committed(store: Store, digests: Iterable[str]) -> dict[str, Outcome]:
    """The committed outcomes among `digests`."""
    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        found = pool.map(lambda digest: lookup(store, digest), list(digests))
        return {outcome.digest: outcome for outcome in found if outcome is not None}
