"""Whole builds of a small model while a proxy hurts the requests between program and server."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import building
from orchestrator.base.errors import OrchestratorError
from orchestrator.releases import collect, list_releases, verify
from orchestrator.spec.build import BuildSpec
from orchestrator.spec.cluster import ClusterSpec, RetrySpec, StoreOptions
from orchestrator.spec.decoding import decode
from orchestrator.stores import open_store
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.here import HereCluster

FAULTS = (Fault.BUSY, Fault.RESET, Fault.LOST_ANSWER, Fault.TRUNCATED, Fault.STALL)
MAX_RUNS = 4
VOCAB_SIZE = 48_000
"""Makes a rank's shard and its engine larger than one part of an upload."""
_TOLERANCE = 1e-3


@dataclass
class Weathered:
    """One build and its re-runs."""

    seed: int
    transfer: str
    requests: int = 0
    hurt: int = 0
    errors: list[str] = field(default_factory=list)
    """Of the runs that failed: class, exit code, message. All are errors of ours with advice."""
    seconds: float = 0.0
    left: int = 0
    """Objects and uploads that `collect` removed."""


def storm_spec(source: Path) -> BuildSpec:
    plain = {
        "source": {"path": str(source)},
        "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
        "verification": {"max_tokens": 12, "decode_steps": 2},
        "release": {"name": "tiny", "version": "1"},
    }
    return decode(BuildSpec, plain, "storm")


def weather(proxy: FaultProxy, url: str, source: Path, seed: int, rate: float) -> Weathered:
    """Build at `url`, through the proxy, in a storm of its own; run it again when it fails; look at everything past the proxy.

    Raises AssertionError when an error is not one of ours, the release is not right in the end, or something stays after all.
    """
    found = Weathered(seed, "obstore" if seed % 2 else "s3fs")
    options = StoreOptions(endpoint_url=proxy.url, transfer=found.transfer, read_timeout_seconds=1.5, max_attempts=4)
    # One attempt of each step: what the store's own retries cannot mend must surface as an error.
    place = ClusterSpec(store=url, store_options=options, retries=RetrySpec(max_attempts=1))
    proxy.seen.clear()
    proxy.hurt = 0
    proxy.storm(seed, rate, FAULTS)
    began = time.monotonic()
    try:
        built = _until_built(storm_spec(source), place, found)
    finally:
        proxy.rate = 0.0
    found.seconds, found.requests, found.hurt = time.monotonic() - began, len(proxy.seen), proxy.hurt
    truth = StoreOptions(endpoint_url=proxy.upstream.endpoint)
    assert [item.problem for item in list_releases(url, options=truth)] == [""]
    verify(built.address, options=truth)
    assert built.manifest.verification is not None
    assert built.manifest.verification.max_relative_error < _TOLERANCE
    found.left = _nothing_is_left(url, truth)
    verify(built.address, options=truth)
    return found


def _until_built(spec: BuildSpec, place: ClusterSpec, found: Weathered) -> building.Build:
    while len(found.errors) < MAX_RUNS:
        try:
            return building.build(spec, place, open_cluster=lambda _: HereCluster())
        except OrchestratorError as error:
            said = f"{type(error).__name__} ({error.exit_code}): {error.message}"
            is_clear = error.exit_code > 2 and bool(error.advice)
        found.errors.append(said)
        assert is_clear, said
    raise AssertionError(f"{MAX_RUNS} runs failed: {found.errors}")


def _nothing_is_left(url: str, options: StoreOptions) -> int:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    removed = collect(url, datetime.timedelta(0), delete=True, options=options, now=later)
    again = collect(url, datetime.timedelta(0), options=options, now=later)
    assert (again.due, again.waiting, again.uploads) == ({}, {}, [])
    store = open_store(url, options)
    assert [*store.list_uploads(""), *store.list("live/"), *store.list("probes/")] == []
    return len(removed.due) + len(removed.uploads)
