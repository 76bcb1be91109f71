"""Events in the store: written while a build runs, whatever the store does, and read back by whoever watches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator import building
from orchestrator.base.errors import (
    CancelledError,
    DriverLostError,
    Interrupted,
    ReleaseMissingError,
    StoreError,
    TerminatedError,
    VerificationError,
)
from orchestrator.cli.commands import app
from orchestrator.events import Errored, Event, Heartbeat, Planned, Published, StepProgressed, StepsFinished, StepStarted
from orchestrator.planning import preparation
from orchestrator.report.journal import HEARTBEAT_SECONDS, Journal, segment_key
from orchestrator.scheduling import commits
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stores import open_store
from orchestrator.stores.store import Store
from orchestrator.submit.watching import PATIENCE_SECONDS, Run, Watch, find_run, list_runs
from tests.support.releases import pretend_to_run, release_spec, tiny_source

KEY = "k" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Flaky:
    """A store whose next writes fail."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failures = 0

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("unreachable")
        self._store.put(key, data, create=create)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def progress(done: int, clock: Clock) -> StepProgressed:
    name = "convert/stage0/group0"
    return StepProgressed(digest="d", step=name, phase="convert", done=done, total=9, unit="bytes", time=clock())


def watched(store: Store, journal: Journal, clock: Clock) -> Watch:
    return Watch(store, Run(journal.run, KEY), clock, clock.sleep)


def test_journal_keeps_the_newest_progress_of_a_step_and_everything_else(store: Store, clock: Clock) -> None:
    journal = Journal(store, KEY, clock)
    started = StepStarted(digest="d", step="convert/stage0/group0", node="n", attempt=1, time=clock())
    for event in (started, progress(1, clock), progress(2, clock), progress(3, clock), StepsFinished(ran=())):
        journal.tell(event)
    journal.flush()
    lines = [json.loads(line) for line in store.get(segment_key(journal.run, 0)).splitlines()]
    assert [line["event"] for line in lines] == ["started", "progress", "finish"]
    assert lines[1]["done"] == 3
    assert {"time", "step", "kind", "rank", "stage", "node", "attempt"} <= lines[0].keys()
    assert (lines[0]["stage"], lines[0]["rank"], lines[0]["node"], lines[0]["attempt"]) == (0, None, "n", 1)


def test_journal_of_a_store_that_fails_for_a_while_loses_and_repeats_nothing(store: Store, clock: Clock) -> None:
    flaky = Flaky(store)
    journal = Journal(flaky, KEY, clock)  # type: ignore[arg-type]  # only put is called
    journal.tell(StepsFinished(ran=("a",)))
    flaky.failures = 2
    for name in ("b", "c", "d"):
        journal.flush()
        journal.tell(StepsFinished(ran=(name,)))
    journal.flush()
    journal.flush()
    journal.tell(Published(manifest="m"))
    journal.flush()
    told = list(watched(store, journal, clock).events())
    assert [event.ran[0] for event in told if isinstance(event, StepsFinished)] == ["a", "b", "c", "d"]


def test_journal_with_nothing_to_say_says_that_it_is_alive(store: Store, clock: Clock) -> None:
    journal = Journal(store, KEY, clock)
    journal.flush()
    clock.now += HEARTBEAT_SECONDS
    journal.flush()
    journal.flush()
    journal.tell(Published(manifest="m"))
    journal.flush()
    assert [type(event) for event in watched(store, journal, clock).events()] == [Heartbeat, Published]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (VerificationError("differs", "look"), VerificationError),
        (KeyboardInterrupt(), CancelledError),
        (Interrupted(2), CancelledError),
        (Interrupted(15), TerminatedError),
    ],
    ids=["failed", "stopped", "stopped-by-ctrl-c", "stopped-by-sigterm"],
)
def test_watch_of_a_build_that_ended_badly_raises_its_own_error(
    store: Store, clock: Clock, error: BaseException, raised: type[Exception]
) -> None:
    with pytest.raises(type(error)), Journal(store, KEY, clock) as journal:
        raise error
    watch = watched(store, journal, clock)
    assert [type(event) for event in watch.events()] == [Errored]
    with pytest.raises(raised):
        watch.result()


def test_watch_of_a_driver_that_died_waits_and_then_says_so(store: Store, clock: Clock) -> None:
    journal = Journal(store, KEY, clock)
    journal.tell(StepsFinished(ran=(), time=clock()))
    journal.flush()
    began = clock.now
    watch = watched(store, journal, clock)
    assert len(list(watch.events())) == 1
    assert PATIENCE_SECONDS <= clock.now - began < PATIENCE_SECONDS + 5
    with pytest.raises(DriverLostError, match="it was silent for"):
        watch.result()


def test_watch_of_a_live_build_shows_what_comes_later(store: Store, clock: Clock) -> None:
    journal = Journal(store, KEY, clock)
    journal.tell(StepsFinished(ran=("first",)))
    journal.flush()

    def sleep(seconds: float) -> None:
        journal.tell(Published(manifest="s3://m"))
        journal.flush()

    watch = Watch(store, Run(journal.run, KEY), clock, sleep)
    assert [type(event) for event in watch.events()] == [StepsFinished, Published]
    assert watch.result().manifest == "s3://m"


def test_build_tells_its_store_and_watch_replays_it(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    spec = release_spec(tiny_source(tmp_path / "source"))
    plan = preparation.plan(spec)
    pretend_to_run(plan, store)
    done = building.build(spec, ClusterSpec(store=store.url))
    (run,) = list_runs(store)
    assert run == find_run(store, "tiny/1") == find_run(store, "tiny") == find_run(store, build=plan.build_key[:8])
    planned, finished, published = Watch(store, run).events()
    assert isinstance(planned, Planned)
    assert planned.release == "tiny/1"
    assert isinstance(finished, StepsFinished)
    assert published == Published(manifest=f"{done.address}/manifest.json", steps_run=0, time=published.time)
    for url in (store.url, done.address, f"{done.address}/manifest.json", str(tmp_path / "store")):
        shown = CliRunner().invoke(app, ["watch", url])
        assert shown.exit_code == 0, shown.output
        assert "published: " in shown.output
    with pytest.raises(ReleaseMissingError, match="no events of a build of other"):
        find_run(store, "other")
    lines = CliRunner().invoke(app, ["watch", store.url, "--json"]).stdout.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["plan", "finish", "published"]


@pytest.mark.parametrize(("options", "said"), [([], "Detached; the build keeps running.\n"), (["--json"], "")])
def test_watch_that_is_interrupted_says_nothing_of_the_builds_end(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    journal = Journal(store, KEY, clock)
    journal.tell(Heartbeat(time=clock()))
    journal.flush()

    def interrupted(watch: Watch) -> Iterator[Event]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Watch, "events", interrupted)
    result = CliRunner().invoke(app, ["watch", store.url, *options])
    assert (result.exit_code, result.stdout.strip()) == (130, said.strip())


def test_build_that_fails_leaves_its_error_to_those_who_watch(tmp_path: Path) -> None:
    spec = release_spec(tiny_source(tmp_path / "source"))
    place = ClusterSpec(store=(tmp_path / "store").as_uri())

    def no_cluster(spec: ClusterSpec) -> object:
        raise VerificationError("rank 1 differs", "compare")

    with pytest.raises(VerificationError):
        building.build(spec, place, open_cluster=no_cluster)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, ["watch", place.store])
    assert (result.exit_code, "rank 1 differs" in result.output) == (VerificationError.exit_code, True)
    assert list(open_store(place.store).list(commits.LIVE)) == []
