"""Places of sources: one contract for folders and object stores, and what a network does to the latter."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import work
from orchestrator.base.errors import SourceCorruptError, SourceMissingError, SpecError, StoreError
from orchestrator.base.pages import page_buffer
from orchestrator.base.urls import is_url
from orchestrator.checkpoints import huggingface, read_source
from orchestrator.model.checkpoint import Assembly, Piece, SourceFile, TensorInfo
from orchestrator.planning import preparation
from orchestrator.planning.steps import Kind, Task
from orchestrator.spec.loading import load_spec, resolve_source
from orchestrator.stores import open_source, open_store
from orchestrator.stores.fsspec import FsspecStore
from orchestrator.stores.remote import PART_BYTES, SMALL_BYTES, WINDOW_BYTES, RemoteFolder, windows
from orchestrator.stores.retrying import Backoff, TransientError, told_apart
from orchestrator.stores.source import LocalFolder, PlannedRange, SourceFolder, planned_ranges
from orchestrator.work.companions import companion_folder
from orchestrator.work.context import Context
from tests.support.synthetic import build_spec, model_config, random_arrays, write_source

MB = 10**6
FILES = {"a.bin": bytes(range(256)) * 4, "config.json": b"{}", "empty": b"", "folder/b.bin": b"below"}


def read_range(place: SourceFolder, name: str, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    with place.open((place.source_file(name),)) as source:
        source.read_into(0, offset, memoryview(buffer))
    return bytes(buffer)


class PlaceContract:
    """What every place does. A subclass gives `place`, holding FILES, and `replace` and `missing`."""

    @pytest.fixture
    def place(self) -> SourceFolder:
        raise NotImplementedError

    @pytest.fixture
    def replace(self) -> Callable[[str, bytes], None]:
        """Put other content under a name."""
        raise NotImplementedError

    @pytest.fixture
    def missing(self) -> SourceFolder:
        """A place that is not there."""
        raise NotImplementedError

    def test_names_are_sorted_and_those_below_have_their_folder(self, place: SourceFolder) -> None:
        assert place.names() == sorted(FILES)

    def test_names_of_no_place_are_refused(self, missing: SourceFolder) -> None:
        with pytest.raises(SourceMissingError):
            missing.names()

    @pytest.mark.parametrize("name", FILES)
    def test_read_whole_is_what_was_written(self, place: SourceFolder, name: str) -> None:
        assert place.read(name) == FILES[name]

    @pytest.mark.parametrize(("begin", "end"), [(0, 10), (7, 9), (5, 5), (1000, None), (1000, 2000), (1024, 1030), (3000, 3001)])
    def test_read_ranges_are_those_of_a_slice(self, place: SourceFolder, begin: int, end: int | None) -> None:
        assert place.read("a.bin", begin, end) == FILES["a.bin"][begin:end]

    def test_read_of_no_file_is_refused(self, place: SourceFolder) -> None:
        with pytest.raises(SourceMissingError, match="nothing"):
            place.read("nothing")

    def test_source_file_has_size_and_a_lasting_identity(self, place: SourceFolder) -> None:
        file = place.source_file("a.bin")
        assert (file.name, file.num_bytes) == ("a.bin", 1024)
        assert file == place.source_file("a.bin") == open_source(place.url).source_file("a.bin")
        assert "a.bin" not in file.identity

    @pytest.mark.parametrize("name", ["nothing", "folder/nothing"])
    def test_source_file_of_no_file_is_refused(self, place: SourceFolder, name: str) -> None:
        with pytest.raises(SourceMissingError, match=name):
            place.source_file(name)

    def test_source_file_of_other_content_has_another_identity(
        self, place: SourceFolder, replace: Callable[[str, bytes], None]
    ) -> None:
        before = place.source_file("a.bin")
        replace("a.bin", bytes(1024))
        assert place.source_file("a.bin").identity != before.identity

    def test_read_into_fills_any_range_and_counts_bytes(self, place: SourceFolder) -> None:
        files = (place.source_file("folder/b.bin"), place.source_file("a.bin"))
        with place.open(files, [(0, 0, 5), (1, 0, 1024)]) as source:
            for file, offset, size in ((1, 1000, 24), (0, 0, 5), (1, 0, 0), (1, 0, 1000)):
                buffer = bytearray(size)
                source.read_into(file, offset, memoryview(buffer))
                assert bytes(buffer) == FILES[files[file].name][offset : offset + size]
            assert source.bytes_read == 1029

    def test_read_into_over_the_end_is_refused(self, place: SourceFolder) -> None:
        with pytest.raises(SourceCorruptError, match="ended at byte 1024"):
            read_range(place, "a.bin", 1000, 25)

    def test_read_into_of_a_replaced_file_is_refused(self, place: SourceFolder, replace: Callable[[str, bytes], None]) -> None:
        planned = place.source_file("a.bin")
        replace("a.bin", bytes(1024))
        with place.open((planned,)) as source, pytest.raises(SourceCorruptError, match="not the file that the plan"):
            source.read_into(0, 0, memoryview(bytearray(4)))

    def test_read_into_of_no_file_is_refused(self, place: SourceFolder) -> None:
        with place.open((SourceFile("nothing", 4, "mtime:1"),)) as source, pytest.raises(SourceMissingError):
            source.read_into(0, 0, memoryview(bytearray(4)))

    def test_the_place_survives_a_pickle(self, place: SourceFolder) -> None:
        assert pickle.loads(pickle.dumps(place)).read("a.bin") == FILES["a.bin"]


class TestLocalPlace(PlaceContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> SourceFolder:
        for name, data in FILES.items():
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return open_source(str(tmp_path / "source"))

    @pytest.fixture
    def replace(self, tmp_path: Path) -> Callable[[str, bytes], None]:
        def put(name: str, data: bytes) -> None:
            path = tmp_path / "source" / name
            time = path.stat().st_mtime_ns
            path.write_bytes(data)
            os.utime(path, ns=(time, time + 1))

        return put

    @pytest.fixture
    def missing(self, tmp_path: Path) -> SourceFolder:
        return open_source(str(tmp_path / "none"))


def forget(path: Path) -> None:
    """Put a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("refused", ["nothing", "open", "read"])
def test_file_source_large_ranges_are_right_at_any_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, refused: str
) -> None:
    data = np.random.default_rng(1).bytes(9 * 2**20 + 77)
    path = tmp_path / "x"
    path.write_bytes(data)
    place = LocalFolder(tmp_path)
    really_open, really_read = os.open, os.preadv

    def open_(name: Any, flags: int, *more: Any) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(22, "no O_DIRECT here")
        return really_open(name, flags, *more)

    def preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if refused == "read" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "no O_DIRECT here")
        return really_read(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    for offset, size in ((0, len(data)), (1, len(data) - 1), (4095, 2**20), (4096, 2**21), (7, 8 * 2**20 + 5), (9, 2**20 - 1)):
        if not cached:
            forget(path)
        assert read_range(place, "x", offset, size) == data[offset : offset + size]
    with pytest.raises(SourceCorruptError, match=f"ended at byte {len(data)}"):
        read_range(place, "x", len(data) - 2**20, 2**20 + 1)


@pytest.mark.parametrize("offset", [0, 8, 4096, 8200])
@pytest.mark.parametrize("shift", [0, 8])
def test_file_source_large_range_into_pages_is_right_and_passes_through_nothing_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, shift: int
) -> None:
    """Only where file and memory both stand on a page; the end of less than a page needs no large buffer."""
    data = np.random.default_rng(2).bytes(3 * 2**20 + 77)
    (tmp_path / "x").write_bytes(data)
    forget(tmp_path / "x")
    filled: list[int] = []
    really_read = os.preadv

    def preadv(descriptor: int, buffers: Any, place: int, flags: int = 0) -> int:
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if direct and within(buffers[0], memory):
            filled.append(len(buffers[0]))
        return really_read(descriptor, buffers, place, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    memory = page_buffer(len(data) + shift)
    place = LocalFolder(tmp_path)
    with place.open((place.source_file("x"),)) as source:
        source.read_into(0, offset, memory[shift : shift + len(data) - offset])
    assert memory[shift : shift + len(data) - offset] == data[offset:]
    assert filled == ([(len(data) - offset) // 4096 * 4096] if shift == offset % 4096 == 0 else [])


def within(part: memoryview, whole: memoryview) -> bool:
    """Whether a buffer is a stretch of another."""
    begin, first = (np.frombuffer(view, np.uint8).ctypes.data for view in (part, whole))
    return bool(first <= begin < first + len(whole))


def test_file_source_leaves_nothing_open_after_large_ranges(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(3 * 2**20))
    forget(tmp_path / "x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    read_range(LocalFolder(tmp_path), "x", 5, 2**21)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def memory() -> Iterator[Callable[[str, Mapping[str, bytes]], str]]:
    """Put files under a folder of memory://; gives its URL."""
    fs = fsspec.filesystem("memory")

    def put(folder: str, files: Mapping[str, bytes]) -> str:
        for name, data in files.items():
            fs.pipe_file(f"/{folder}/{name}", data)
        return f"memory://{folder}"

    yield put
    fs.store.clear()


class TestMemoryPlace(PlaceContract):
    @pytest.fixture
    def place(self, memory: Callable[[str, Mapping[str, bytes]], str]) -> SourceFolder:
        return open_source(memory("models/tiny", FILES))

    @pytest.fixture
    def replace(self, memory: Callable[[str, Mapping[str, bytes]], str]) -> Callable[[str, bytes], None]:
        return lambda name, data: str(memory("models/tiny", {name: data}))

    @pytest.fixture
    def missing(self) -> SourceFolder:
        return open_source("memory://models/none")


class FaultyFs:
    """An object store with one object 'root/x' and faults: what `cat_file` raises or returns next; then it works."""

    def __init__(self, data: bytes, *faults: Exception | bytes) -> None:
        self.data, self.faults = data, list(faults)
        self.asked: list[tuple[int, int]] = []
        self.looked = 0
        self.etag = "1"
        self._lock = threading.Lock()

    def _strip_protocol(self, url: str) -> str:
        return "root"

    def info(self, path: str) -> dict[str, Any]:
        with self._lock:
            self.looked += 1
        if path != "root/x":
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.data), "type": "file", "ETag": f'"{self.etag}"'}

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        with self._lock:
            self.asked.append((start, end))
            fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault if fault is not None else self.data[start:end]


class Faulty:
    """A place on a FaultyFs; sleeps are written down, not slept."""

    def __init__(self, data: bytes, *faults: Exception | bytes) -> None:
        self.fs, self.slept = FaultyFs(data, *faults), list[float]()
        backoff = Backoff(max_attempts=8, sleep=self.slept.append, draw=lambda: 1.0)
        self.place = RemoteFolder(FsspecStore("fake://root", fs=self.fs, backoff=backoff))

    def read(self, offset: int, size: int, planned: list[PlannedRange] | None = None) -> bytes:
        buffer = bytearray(size)
        with self.place.open((self.place.source_file("x"),), planned or ()) as source:
            source.read_into(0, offset, memoryview(buffer))
        return bytes(buffer)


class _ClientPayloadError(Exception):
    pass


_ClientPayloadError.__module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize(
    "fault", [OSError("reset"), TimeoutError(), ConnectionResetError(), _ClientPayloadError("payload"), b"short", b""], ids=repr
)
def test_fetch_that_fails_twice_then_works_gives_the_bytes(fault: Exception | bytes) -> None:
    faulty = Faulty(b"0123456789", fault, fault)
    assert faulty.read(2, 6) == b"234567"
    assert faulty.slept == [0.5, 1.0]


def test_fetch_that_never_works_is_a_store_error_with_growing_bounded_delays() -> None:
    faulty = Faulty(b"0123456789", *[OSError("SlowDown")] * 100)
    with pytest.raises(StoreError, match=r"cannot read 'x' in fake://root, tried 8 times: OSError: SlowDown"):
        faulty.read(2, 6)
    assert faulty.slept == [0.5, 1, 2, 4, 8, 16, 30]


def test_fetch_of_a_body_that_is_always_short_is_corrupt() -> None:
    faulty = Faulty(b"0123456789", *[b"01"] * 100)
    with pytest.raises(SourceCorruptError, match="ended at byte 4, asked for 2 to 8"):
        faulty.read(2, 6)


@pytest.mark.parametrize("fault", [PermissionError("denied"), OSError(22, "InvalidRequest"), ValueError("a bug")], ids=repr)
def test_fetch_that_cannot_ever_work_is_not_repeated(fault: Exception) -> None:
    faulty = Faulty(b"0123456789", fault)
    assert not isinstance(told_apart(fault), TransientError)
    with pytest.raises(StoreError):
        faulty.read(2, 6)
    assert faulty.slept == []


def test_fetch_of_an_object_that_vanished_is_missing() -> None:
    with pytest.raises(SourceMissingError, match="fake://root/x is missing"):
        Faulty(b"0123456789", FileNotFoundError()).read(2, 6)


def test_read_into_after_a_replacement_is_refused() -> None:
    faulty = Faulty(b"0123456789")
    planned = faulty.place.source_file("x")
    faulty.fs.etag = "2"
    with faulty.place.open((planned,)) as source, pytest.raises(SourceCorruptError, match="etag:2, planned 10 bytes etag:1"):
        source.read_into(0, 0, memoryview(bytearray(4)))


def test_read_into_of_a_large_range_is_fetched_in_parts_at_once() -> None:
    data = np.random.default_rng(3).bytes(40 * MB)
    faulty = Faulty(data, OSError("reset"), b"short")
    assert faulty.read(1000, 35 * MB) == data[1000 : 1000 + 35 * MB]
    parts = sorted(set(faulty.fs.asked))
    assert len(parts) == 4
    assert all(PART_BYTES * 2 / 3 <= end - begin <= PART_BYTES * 1.5 for begin, end in parts)
    assert all(one[1] == two[0] for one, two in pairwise(parts))
    assert len(faulty.slept) == 2


def test_read_into_parts_are_in_flight_together() -> None:
    faulty = Faulty(bytes(16 * 2**20))
    together = threading.Barrier(2, timeout=10)
    plain = faulty.fs.cat_file

    def wait(path: str, start: int, end: int) -> bytes:
        together.wait()
        return plain(path, start, end)

    faulty.fs.cat_file = wait  # type: ignore[method-assign]
    assert len(faulty.read(0, 16 * 2**20)) == 16 * 2**20


def test_readers_of_different_windows_fetch_at_the_same_time() -> None:
    """Eight requests are under way together: nobody holds, while fetching, what another reader needs."""
    spans = [(begin, begin + 100) for start in range(0, 8000, 1000) for begin in (start, start + 100)]
    faulty = Faulty(bytes(range(250)) * 40)
    together = threading.Barrier(8, timeout=20)
    plain = faulty.fs.cat_file

    def wait(path: str, start: int, end: int) -> bytes:
        together.wait()
        return plain(path, start, end)

    faulty.fs.cat_file = wait  # type: ignore[method-assign]
    with faulty.place.open((faulty.place.source_file("x"),), [(0, *span) for span in spans]) as source:

        def read(span: tuple[int, int]) -> bytes:
            buffer = bytearray(span[1] - span[0])
            source.read_into(0, span[0], memoryview(buffer))
            return bytes(buffer)

        with ThreadPoolExecutor(8) as pool:
            first = list(pool.map(read, spans[::2]))
        assert first + [read(span) for span in spans[1::2]] == [
            faulty.fs.data[begin:end] for begin, end in spans[::2] + spans[1::2]
        ]
    assert sorted(faulty.fs.asked) == [(start, start + 200) for start in range(0, 8000, 1000)]


def test_readers_of_one_window_wait_for_its_one_fetch() -> None:
    faulty = Faulty(bytes(range(250)) * 40)
    spans = [(begin, begin + 100) for begin in range(0, 800, 100)]
    at_once = threading.Barrier(8, timeout=20)
    with faulty.place.open((faulty.place.source_file("x"),), [(0, *span) for span in spans]) as source:

        def read(span: tuple[int, int]) -> bytes:
            buffer = bytearray(span[1] - span[0])
            at_once.wait()
            source.read_into(0, span[0], memoryview(buffer))
            return bytes(buffer)

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(read, spans))
    assert found == [faulty.fs.data[begin:end] for begin, end in spans]
    assert faulty.fs.asked == [(0, 800)]
    assert faulty.fs.looked == 2  # for the plan, and before the first read


def test_readers_of_different_files_look_at_them_at_the_same_time() -> None:
    faulty = Faulty(b"0123456789")
    (planned,) = files = (faulty.place.source_file("x"),)
    together = threading.Barrier(4, timeout=20)
    plain = faulty.fs.info

    def wait(path: str) -> dict[str, Any]:
        together.wait()
        return plain(path)

    faulty.fs.info = wait  # type: ignore[method-assign]
    with faulty.place.open(4 * files) as source, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: source.read_into(number, 0, memoryview(bytearray(planned.num_bytes))), range(4)))


def test_read_into_a_part_that_fails_for_good_fails_the_read() -> None:
    faulty = Faulty(bytes(20 * MB), PermissionError("denied"))
    with pytest.raises(StoreError, match="denied"):
        faulty.read(0, 20 * MB)


def test_small_planned_neighbours_are_fetched_once_together() -> None:
    data = bytes(range(250)) * 10
    faulty = Faulty(data)
    ranges = [(begin, begin + 100) for begin in range(0, 2000, 100)]
    with faulty.place.open((faulty.place.source_file("x"),), [(0, *span) for span in ranges]) as source:
        for begin, end in reversed(ranges):
            buffer = bytearray(end - begin)
            source.read_into(0, begin, memoryview(buffer))
            assert bytes(buffer) == data[begin:end]
        assert source.bytes_read == 2000
    assert faulty.fs.asked == [(0, 2000)]


@pytest.mark.parametrize("planned", [[], [(0, 0, 60), (0, 60, 99)], [(0, 60, 120), (0, 120, 140)]])
def test_small_reads_that_nobody_planned_are_fetched_alone(planned: list[PlannedRange]) -> None:
    faulty = Faulty(bytes(range(250)) * 20)
    assert faulty.read(100, 50, planned) == bytes(range(100, 150))
    assert faulty.fs.asked == [(100, 150)]


def test_windows_over_the_memory_limit_are_read_one_by_one_and_no_byte_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.stores.remote._HELD_BYTES", 250)
    faulty = Faulty(bytes(range(250)) * 40)
    spans = [(begin, begin + 100) for start in (0, 3000, 6000) for begin in (start, start + 100)]
    with faulty.place.open((faulty.place.source_file("x"),), [(0, *span) for span in spans]) as source:
        for begin, end in spans[::2] + spans[1::2]:
            source.read_into(0, begin, memoryview(bytearray(end - begin)))
        assert source.bytes_read == 600
    assert faulty.fs.asked == [(0, 200), (3000, 3100), (6000, 6100), (3100, 3200), (6100, 6200)]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(0, 9)), max_size=30))
def test_windows_cover_each_planned_byte_once(plain: list[tuple[int, int, int]]) -> None:
    unit = SMALL_BYTES // 8
    planned = [(file, begin * unit, (begin + size) * unit) for file, begin, size in plain]
    small = {item for item in planned if 0 < item[2] - item[1] < SMALL_BYTES}
    found = windows(planned)
    for mine in found.values():
        assert all(one.end <= two.begin for one, two in pairwise(mine))
    for file, begin, end in small:
        assert sum(window.begin <= begin and end <= window.end for window in found[file]) == 1
    wanted = {(file, place) for file, begin, end in small for place in range(begin, end, unit)}
    planned_bytes = {file: sum(window.left for window in mine) for file, mine in found.items()}
    assert planned_bytes == {file: unit * count for file, count in Counter(file for file, _ in wanted).items()}


def test_windows_are_bounded_and_span_no_gap() -> None:
    step = SMALL_BYTES // 2
    found = windows([(0, begin, begin + step) for begin in range(0, 20 * step, step)] + [(0, 20 * step + 1, 20 * step + 6)])
    assert [window.end - window.begin for window in found[0]] == [WINDOW_BYTES, WINDOW_BYTES, 20 * step - 2 * WINDOW_BYTES, 5]


def test_planned_ranges_follow_pieces_but_not_encodings() -> None:
    pieces = (Piece(1, 10, (2, 3)), Piece(2, 50, (1, 3)))
    tensors = [
        TensorInfo("plain", "BF16", (4,), 0, 100, 8),
        TensorInfo("joined", "BF16", (3, 3), 1, 10, 18, Assembly(pieces)),
        TensorInfo("packed", "BF16", (3, 3), 1, 10, 18, Assembly(pieces, encoding="Q8_0")),
    ]
    assert list(planned_ranges(tensors)) == [(0, 100, 108), (1, 10, 22), (2, 50, 56)]


def test_open_place_of_a_url_with_a_password_is_refused() -> None:
    with pytest.raises(SpecError, match="password"):
        open_source("s3://key:secret@bucket/model")


def test_open_place_of_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StoreError, match="cannot open the source"):
        open_source("nosuch://bucket/model").names()


def test_open_place_of_a_file_url_is_the_folder(tmp_path: Path) -> None:
    place = open_source((tmp_path / "a b").as_uri())
    assert isinstance(place, LocalFolder)
    assert place.folder == tmp_path / "a b"


@pytest.mark.parametrize("url", ["s3://bucket/model", "memory://x", "gs://b"])
def test_load_spec_leaves_a_url_alone(tmp_path: Path, url: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps({"source": {"path": url}, "release": {"name": "a", "version": "1"}}))
    assert is_url(url)
    assert load_spec(path).source.path == url


def test_resolve_source_of_folders_is_absolute(tmp_path: Path) -> None:
    assert resolve_source("model", tmp_path) == str(tmp_path / "model")
    assert resolve_source("/model", tmp_path) == "/model"
    assert resolve_source("file:///a%20b", tmp_path) == "/a b"


@pytest.fixture
def remote_model(tmp_path: Path, memory: Callable[[str, Mapping[str, bytes]], str]) -> tuple[Path, str]:
    """A model in a folder, and the same under a URL."""
    config = model_config()
    folder = write_source(tmp_path / "model", config, random_arrays(config), num_files=2)
    return folder, memory("model", {path.name: path.read_bytes() for path in folder.iterdir()})


def test_read_source_of_a_url_is_that_of_the_folder(remote_model: tuple[Path, str]) -> None:
    folder, url = remote_model
    index, extra = read_source(url)
    wanted = huggingface.read_index(LocalFolder(folder))
    assert dict(index.tensors) == dict(wanted.tensors)
    assert [file.name for file in extra] == ["config.json"]


def test_convert_from_a_url_gives_the_same_bytes_and_reads_each_once(remote_model: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = remote_model
    found = []
    for source in (str(folder), url):
        made = preparation.plan(build_spec(source, topology={"tp": 2}))
        (step,) = made.of_kind(Kind.CONVERT)
        store = (tmp_path / re.sub(r"\W", "", source)).as_uri()
        outcome = work.run(Task(step=step, inputs={}, attempt=1, store=store), lambda event: None)
        assert outcome.facts.source_bytes_read == made.inputs.index.num_bytes
        found.append([(output.name, output.sha256) for output in outcome.outputs])
    assert found[0] == found[1]


def test_companion_folder_of_a_file_that_changed_is_refused(remote_model: tuple[Path, str], tmp_path: Path) -> None:
    _, url = remote_model
    context = Context(open_store((tmp_path / "store").as_uri()), "", tmp_path, lambda *words: None, lambda line: None)
    with pytest.raises(SourceCorruptError, match="was changed during the build"):
        companion_folder({"source": url}, (SourceFile("config.json", 5, "sha256:" + "0" * 64),), context, "huggingface")
