"""Collecting: what is needed stays, whatever there is; what is not goes, when it has been so for long enough."""

from __future__ import annotations

import datetime
import errno
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import building
from orchestrator.base.errors import SpecError, StoreError
from orchestrator.planning.steps import Kind, Outcome, Output
from orchestrator.releases import collect, collecting, list_releases, open_release, tag, verify
from orchestrator.releases.manifest import MANIFEST
from orchestrator.scheduling import commits
from orchestrator.spec.cluster import ClusterSpec, StoreOptions
from orchestrator.stores import open_store
from orchestrator.stores.folders import find_files
from orchestrator.stores.retrying import Backoff, TransientError
from orchestrator.stores.s3 import S3Store
from orchestrator.stores.store import Store
from tests.support.releases import Published, flip, publish_tiny

GRACE = datetime.timedelta(days=7)
START = datetime.datetime.now(datetime.UTC)


def _later(days: float) -> datetime.datetime:
    return START + datetime.timedelta(days=days)


def _keys(store: Store) -> set[str]:
    """Without those of what builds have said: they are no part of a release."""
    return {info.key for info in store.list("") if not info.key.startswith(commits.EVENTS)} - {collecting.SEEN}


def _stray(store: Store, digest: str, committed: bool) -> set[str]:
    """A step that no release was made of, committed or broken off."""
    key = commits.attempt_prefix(digest, "attempt") + "out"
    store.put(key, b"bytes")
    if committed:
        output = Output(name="out", key=key, num_bytes=5, sha256="00" * 32)
        commits.commit(store, Outcome(digest=digest, name="stray", kind=Kind.CONVERT, outputs=(output,)))
        return {key, commits.outcome_key(digest)}
    return {key}


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return publish_tiny(tmp_path)


def test_collect_by_default_deletes_nothing_and_tells_what_waits(published: Published) -> None:
    said = {info.key for info in published.store.list(commits.EVENTS)}
    strays = _stray(published.store, "ab" * 32, committed=True) | said
    before = _keys(published.store)
    first = collect(published.store.url, GRACE, now=START)
    assert (first.due, set(first.waiting)) == ({}, strays)
    second = collect(published.store.url, GRACE, now=_later(8))
    assert (set(second.due), second.waiting) == (strays, {})
    assert _keys(published.store) == before


def test_collect_deletes_what_was_unneeded_for_the_grace_period_and_no_more(published: Published) -> None:
    needed = _keys(published.store)
    old = _stray(published.store, "ab" * 32, committed=True) | _stray(published.store, "cd" * 32, committed=False)
    published.store.put("releases/tiny/2/0123456789ab-00000000/rank0.engine", b"of a dead publish")
    published.store.put("releases/tiny/1/signatures/feed.sig", b"of a loser")
    collect(published.store.url, GRACE, delete=True, now=START)
    young = _stray(published.store, "ef" * 32, committed=True)
    found = collect(published.store.url, GRACE, delete=True, now=_later(7))
    assert old < set(found.due)
    assert _keys(published.store) == needed | young
    verify(published.url)


def test_collect_keeps_the_cache_of_a_release(published: Published) -> None:
    for day in (0, 10, 20):
        collect(published.store.url, GRACE, delete=True, now=_later(day))
    spec = published.plan.spec
    again = spec.model_copy(update={"release": spec.release.model_copy(update={"version": "2"})})
    done = building.build(again, ClusterSpec(store=published.store.url))
    assert done.result is not None
    assert done.result.ran == frozenset()


def test_collect_keeps_what_a_running_build_counts_on(published: Published) -> None:
    digest = "ab" * 32
    strays = _stray(published.store, digest, committed=True)
    collect(published.store.url, GRACE, now=START)
    with commits.in_use(published.store, [digest], "releases/tiny/2/"):
        published.store.put("releases/tiny/2/new/rank0.engine", b"just copied")
        collect(published.store.url, GRACE, delete=True, now=START + GRACE - datetime.timedelta(seconds=1))
        found = collect(published.store.url, datetime.timedelta(minutes=5), delete=True)
        assert [key for key in found.due if not key.startswith(commits.EVENTS)] == []
        assert strays < _keys(published.store)


def test_collect_a_build_that_died_is_not_believed_for_ever(published: Published) -> None:
    digest = "ab" * 32
    strays = _stray(published.store, digest, committed=True)
    live = commits.LiveBuild(started_at=START, steps=(digest,), release="releases/tiny/2/")
    published.store.put("live/dead.json", live.model_dump_json().encode())
    collect(published.store.url, GRACE, delete=True, now=_later(1))
    assert strays < _keys(published.store)
    collect(published.store.url, GRACE, delete=True, now=_later(8))
    collect(published.store.url, GRACE, delete=True, now=_later(16))
    assert not (strays | {"live/dead.json"}) & _keys(published.store)


def test_collect_puts_back_what_a_build_that_began_meanwhile_has_seen(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = "ab" * 32
    strays = _stray(published.store, digest, committed=True)
    collect(published.store.url, GRACE, now=START)
    announced = commits.in_use(published.store, [digest], "releases/tiny/2/")
    original, looks = collecting._live, []

    def live(store: Store, oldest: datetime.datetime) -> collecting._Live:
        looks.append(commits.lookup(published.store, digest) is not None)
        if len(looks) == 2:  # after the outcomes were deleted: a build announced itself just before that
            announced.__enter__()
        return original(store, START - GRACE)

    monkeypatch.setattr(collecting, "_live", live)
    found = collect(published.store.url, GRACE, delete=True, now=_later(8))
    announced.__exit__(None, None, None)
    assert looks == [True, False]
    assert not strays & set(found.due)
    assert commits.lookup(published.store, digest) is not None


def test_collect_leaves_a_release_whose_manifest_it_cannot_read(published: Published) -> None:
    flip(published.folder / MANIFEST, 200)
    before = {key for key in _keys(published.store) if key.startswith("releases/")}
    for day in (0, 10, 20):
        collect(published.store.url, GRACE, delete=True, now=_later(day))
    assert before <= _keys(published.store)


DIGEST = st.integers(0, 5).map(lambda number: f"{number:02x}" * 32)
ACTION = st.one_of(
    st.tuples(st.just("stray"), DIGEST, st.booleans()),
    st.tuples(st.just("collect"), st.floats(0, 12), st.booleans()),
    st.tuples(st.just("announce"), DIGEST, st.booleans()),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTION, max_size=10))
def test_collect_never_removes_what_a_manifest_or_a_running_build_needs(
    tmp_path_factory: pytest.TempPathFactory, store_archive: bytes, actions: list[tuple[str, object, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("property") / uuid.uuid4().hex
    with tarfile.open(fileobj=io.BytesIO(store_archive)) as archive:
        archive.extractall(folder, filter="data")
    store = open_store(folder.as_uri())
    needed = _keys(store)
    announced: set[str] = set()
    day = 0.0
    for what, value, flag in actions:
        if what == "stray":
            added = _stray(store, str(value), flag)
            if value in announced:
                needed |= {key for key in added if commits.lookup(store, str(value)) or key.startswith("steps/")}
        elif what == "announce":
            announced.add(str(value))
            live = commits.LiveBuild(started_at=_later(1000), steps=(str(value),), release="releases/x/1/")
            store.put(f"live/{value}.json", live.model_dump_json().encode())
            needed |= {key for key in _keys(store) if str(value) in key}
        else:
            assert isinstance(value, float)
            day += value
            collect(store.url, GRACE, delete=flag, now=_later(day))
        assert needed <= _keys(store)
    verify(f"{store.url}/releases/tiny/1")
    assert open_release(f"{store.url}/tags/prod").manifest.name == "tiny"


@pytest.fixture(scope="module")
def store_archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("base")
    published = publish_tiny(folder, topology={"tp": 1})
    tag(published.url, "prod")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.add(folder / "store", ".")
    return data.getvalue()


def test_collect_removes_the_events_of_ended_builds_and_keeps_those_of_live_ones(published: Published) -> None:
    events = {info.key for info in published.store.list(commits.EVENTS)}
    assert events
    collect(published.store.url, GRACE, delete=True, now=START)
    live = commits.LiveBuild(started_at=_later(7), steps=(), build_key=published.plan.build_key)
    published.store.put("live/now.json", live.model_dump_json().encode())
    assert not events & collect(published.store.url, GRACE, delete=True, now=_later(7)).due.keys()
    published.store.delete("live/now.json")
    assert not events & collect(published.store.url, GRACE, delete=True, now=_later(8)).due.keys()  # unneeded since now
    assert events <= collect(published.store.url, GRACE, delete=True, now=_later(16)).due.keys()
    assert list(published.store.list(commits.EVENTS)) == []


def _strays_are_due(published: Published) -> set[str]:
    """Things that the next look is going to delete."""
    strays = _stray(published.store, "ab" * 32, committed=True)
    collect(published.store.url, GRACE, delete=True, now=START)
    return strays


AS_NOBODY = """
import os, sys, datetime
from orchestrator.base.errors import StoreError
from orchestrator.releases import collect
collect(sys.argv[1])  # as root: imports what it needs
os.chmod(sys.argv[2], 0o300)
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=30)
try:
    found = collect(sys.argv[1], datetime.timedelta(days=7), delete=True, now=now)
except StoreError as error:
    print("refused:", error)
else:
    print("deleted:", len(found.due))
"""
"""Permissions do not stop root."""


@pytest.mark.parametrize("folder", ["releases", "releases/tiny", "releases/tiny/1", "steps", "live"])
def test_collect_folder_that_cannot_be_listed_stops_it_before_it_deletes(folder: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders let nobody else pass
        published = publish_tiny(Path(name))
        published.store.put("live/x.json", b"{}")
        _strays_are_due(published)
        root = Path(name)
        for path in (root, *root.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        before = _keys(published.store)
        closed = root / "store" / folder
        command = [sys.executable, "-c", AS_NOBODY, published.store.url, str(closed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        closed.chmod(0o777)
        assert done.stdout.startswith("refused: cannot list"), done.stdout + done.stderr
        assert f"Permission denied at {closed}" in done.stdout
        assert _keys(published.store) == before


def test_collect_folder_that_is_replaced_while_it_is_listed_stops_it(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a listing finds to be a folder is none any more when its turn comes."""
    _strays_are_due(published)
    before = _keys(published.store)
    honest = os.scandir

    def scandir(folder: Path) -> object:
        if Path(folder).name == "tiny":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        return honest(folder)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        with pytest.raises(StoreError, match=r"Not a directory at .*/releases/tiny"):
            collect(published.store.url, GRACE, delete=True, now=_later(30))
    assert _keys(published.store) == before


def test_collect_release_behind_a_link_to_another_disk_is_seen(published: Published, tmp_path: Path) -> None:
    needed = _keys(published.store)
    root = Path(published.store.url.removeprefix("file://"))
    (root / "releases" / "tiny").rename(tmp_path / "other-disk")
    (root / "releases" / "tiny").symlink_to(tmp_path / "other-disk")
    strays = _strays_are_due(published)
    collect(published.store.url, GRACE, delete=True, now=_later(30))
    assert _keys(published.store) == needed
    assert not strays & _keys(published.store)


def test_collect_folder_that_leads_back_to_one_above_it_is_an_error(published: Published) -> None:
    root = Path(published.store.url.removeprefix("file://"))
    (root / "releases" / "loop").symlink_to(root / "releases")
    with pytest.raises(StoreError, match="leads back"):
        collect(published.store.url, GRACE, delete=True, now=_later(30))


class _Folders(AbstractFileSystem):
    """A file system of folders that has no listing of its own, as SFTP's has none; one folder cannot be read."""

    def __init__(self, broken: str) -> None:
        super().__init__(skip_instance_cache=True)
        self._broken = broken

    def ls(self, path: str, detail: bool = True, **named: object) -> list[dict[str, object]]:
        folders = {"s": ["s/a", "s/b"], "s/a": ["s/a/c"], "s/a/c": [], "s/b": []}
        if path == self._broken:
            raise PermissionError(errno.EACCES, "denied", path)
        if path not in folders:
            raise FileNotFoundError(path)
        below = [{"name": name, "type": "directory", "size": 0} for name in folders[path]]
        return [*below, {"name": f"{path}/file", "type": "file", "size": 3}]


@pytest.mark.parametrize("broken", ["s", "s/a", "s/a/c", "s/b"])
def test_find_files_fsspec_folder_that_cannot_be_listed_is_an_error(broken: str) -> None:
    """fsspec's own find goes on without it."""
    assert sorted(find_files(_Folders(""), "s")) == ["s/a/c/file", "s/a/file", "s/b/file", "s/file"]
    assert find_files(_Folders(""), "nothing") == {}
    assert len(_Folders(broken).find("s")) < 4
    with pytest.raises(PermissionError):
        find_files(_Folders(broken), "s")


MANIFESTS = [b"", b"{", b'{"schema_version": 2, "steps": {"x": "y"}}', b'{"schema_version": 1}', b"\xff\xfe"]


@pytest.mark.parametrize("data", MANIFESTS)
def test_collect_manifest_that_is_not_understood_keeps_what_it_may_stand_on(published: Published, data: bytes) -> None:
    needed = _keys(published.store) | _strays_are_due(published)
    (published.folder / MANIFEST).write_bytes(data)
    for day in (10, 20, 30):
        found = collect(published.store.url, GRACE, delete=True, now=_later(day))
        assert found.unreadable == ["releases/tiny/1/manifest.json"]
    assert needed <= _keys(published.store)


def test_collect_announcement_that_is_not_understood_is_believed_for_the_grace_period(published: Published) -> None:
    strays = _strays_are_due(published)
    published.store.put("live/newer.json", b'{"schema": 9}')
    collect(published.store.url, GRACE, delete=True, now=_later(8))
    found = collect(published.store.url, GRACE, delete=True, now=_later(14))
    assert found.unreadable == ["live/newer.json"]
    assert strays <= _keys(published.store)
    for day in (16, 24):
        collect(published.store.url, GRACE, delete=True, now=_later(day))
    assert not (strays | {"live/newer.json"}) & _keys(published.store)


def test_collect_outcome_that_is_not_understood_keeps_its_outputs_for_the_release(published: Published) -> None:
    digest = next(iter(published.manifest.steps.values()))
    needed = _keys(published.store)
    published.store.put(commits.outcome_key(digest), b'{"of": "a newer program"}')
    for day in (0, 10, 20):
        collect(published.store.url, GRACE, delete=True, now=_later(day))
    assert needed <= _keys(published.store)


class _Pages(S3Store):
    """A bucket whose listings are answered from a script."""

    def __init__(self, *pages: dict[str, object] | Exception) -> None:
        super().__init__("s3://models/s", StoreOptions(), fs=True, backoff=Backoff(max_attempts=2, sleep=lambda seconds: None))
        self._pages_left = list(pages)

    def call(self, operation: str, key: str | None = None, body: bytes | None = None, **parameters: object) -> dict[str, Any]:
        page = self._pages_left.pop(0)
        if isinstance(page, Exception):
            raise page
        return page


_PAGE: dict[str, object] = {"Contents": [{"Key": "s/releases/a/1/manifest.json", "Size": 5}], "IsTruncated": True}


@pytest.mark.parametrize(
    "pages",
    [
        [_PAGE],
        [{**_PAGE, "NextContinuationToken": ""}],
        [{**_PAGE, "NextContinuationToken": "t"}, {**_PAGE, "NextContinuationToken": "t"}],
        [{**_PAGE, "NextContinuationToken": "t"}, TransientError("500"), TransientError("500")],
        [{**_PAGE, "NextContinuationToken": "t"}, StoreError("AccessDenied (403)")],
    ],
)
def test_list_s3_listing_that_ends_early_is_an_error(pages: list[dict[str, object] | Exception]) -> None:
    with pytest.raises(StoreError, match="cannot list"):
        list(_Pages(*pages).list("releases/"))


@pytest.mark.parametrize("days", [-1, 36_501])
def test_collect_of_an_impossible_grace_period_is_refused(tmp_path: Path, days: int) -> None:
    with pytest.raises(SpecError, match="grace period of"):
        collect(tmp_path.as_uri(), datetime.timedelta(days=days))


@pytest.mark.parametrize("url", ["file://{}/nowhere", "memory://nowhere-{}"])
def test_collect_and_releases_of_a_store_that_is_not_there_are_errors_and_make_none(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path)
    for look in (collect, list_releases):
        with pytest.raises(StoreError, match="there is no store at"):
            look(url)
    assert not (tmp_path / "nowhere").exists()
