from __future__ import annotations

import errno
import os
import resource
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import StoreError
from orchestrator.base.pages import page_buffer
from orchestrator.stores import file, open_store
from orchestrator.stores.file import FileStore
from orchestrator.stores.fsspec import FsspecStore
from orchestrator.stores.store import BLOCK_BYTES, ObjectChangedError, Store, check_writable
from tests.contracts.store_contract import StoreContract, listed, write_half_and_fail

STAGE_BYTES = 2 * 4096


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestFileStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store((tmp_path / "store").as_uri())


class TestFileStoreWithoutPageCache(StoreContract):
    """As if every object were large."""

    @pytest.fixture
    def store(self, tmp_path: Path, small_stage: None) -> Store:
        return open_store((tmp_path / "store").as_uri())


class TestMemoryStore(StoreContract):
    shared_by_processes = False
    leaves_uploads = False

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        """memory:// is one space for the whole process: each test gets a corner of its own."""
        made = open_store(f"memory://{uuid.uuid4().hex}")
        yield made
        for key in listed(made):
            made.delete(key)


@pytest.fixture
def small_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_DIRECT_BYTES", 1)
    monkeypatch.setattr(file, "_STAGE_BYTES", STAGE_BYTES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def file_store(folder: Path) -> Store:
    return open_store(folder.as_uri())


def test_file_store_objects_are_files_under_their_keys(file_store: Store, folder: Path) -> None:
    file_store.put("a/b.json", b"1")
    assert (folder / "a" / "b.json").read_bytes() == b"1"
    assert file_store.local_path("a/b.json") == folder / "a" / "b.json"


def test_file_store_leaves_no_temporary_files(file_store: Store, folder: Path) -> None:
    file_store.put("a/one", b"1", create=True)
    file_store.put("a/one", b"2")
    with pytest.raises(StoreError):
        file_store.put("a/one", b"3", create=True)
    with pytest.raises(ZeroDivisionError):
        write_half_and_fail(file_store, "a/two", 100)
    with pytest.raises(StoreError), file_store.writer("a/two", 100) as writer:
        writer.write(b"x")
    for _ in range(2):
        file_store.copy("a/one", "b/copy")
    file_store.copy("a/one", "a/one")
    assert files_below(folder) == ["a/one", "b/copy"]


def test_file_store_list_passes_over_what_is_being_written(file_store: Store, folder: Path) -> None:
    with file_store.writer("a/key", 3) as writer:
        writer.write(b"123")
        assert len(files_below(folder)) == 1
        assert listed(file_store) == {}
    assert files_below(folder) == ["a/key"]


def test_file_store_copy_shares_the_bytes_of_the_source(file_store: Store, folder: Path) -> None:
    file_store.put("source", b"12345")
    file_store.copy("source", "target")
    assert (folder / "source").stat().st_ino == (folder / "target").stat().st_ino


@pytest.mark.parametrize(
    "num_bytes", [1, 4095, 4096, 4097, STAGE_BYTES, STAGE_BYTES + 1, 3 * STAGE_BYTES - 1, 3 * STAGE_BYTES + 4096]
)
@pytest.mark.parametrize("piece", [1000, 4096, STAGE_BYTES, 10 * STAGE_BYTES])
def test_file_store_large_object_written_in_any_pieces_is_whole(
    file_store: Store, small_stage: None, num_bytes: int, piece: int
) -> None:
    data = (bytes(range(251)) * (num_bytes // 251 + 1))[:num_bytes]
    with file_store.writer("large", num_bytes) as writer:
        for begin in range(0, num_bytes, piece):
            writer.write(data[begin : begin + piece])
    assert file_store.get("large") == data


@given(
    sizes=st.lists(st.sampled_from([1, 8, 4095, 4096, 8192, STAGE_BYTES + 1, 5 * 4096]), max_size=6), shift=st.sampled_from([0, 8])
)
def test_file_store_pieces_on_and_off_pages_are_written_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shift: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_DIRECT_BYTES", 1), ("_STAGE_BYTES", STAGE_BYTES), ("_UNSTAGED_BYTES", 4096)):
            patch.setattr(file, name, value)
        store = open_store(tmp_path_factory.mktemp("store").as_uri())
        written = b""
        with store.writer("large", sum(sizes)) as writer:
            for number, size in enumerate(sizes):
                piece = page_buffer(shift + size)[shift:]
                piece[:] = bytes((number + place) % 251 for place in range(size))
                written += piece
                writer.write(piece)
                piece[:] = bytes(size)  # the caller's memory is its own again
        assert store.get("large") == written


def test_file_store_large_pieces_on_pages_are_written_from_where_they_are(
    file_store: Store, small_stage: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "_UNSTAGED_BYTES", 4096)
    requests: list[int] = []
    really_write = os.pwrite

    def pwrite(descriptor: int, data: memoryview, place: int) -> int:
        requests.append(len(data))
        return really_write(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    pages = page_buffer(10 * STAGE_BYTES)
    with file_store.writer("large", 8 * STAGE_BYTES) as writer:
        writer.write(bytes(4096))
        writer.write(pages[: 7 * STAGE_BYTES])  # one request, not seven stages full
        writer.write(pages[: STAGE_BYTES - 4096])
    assert requests == [4096, 7 * STAGE_BYTES, STAGE_BYTES - 4096]


def test_file_store_large_object_where_the_page_cache_cannot_be_bypassed_is_whole(
    file_store: Store, folder: Path, small_stage: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            path.touch()  # as Linux does: the file is made before the flag is refused
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with file_store.writer("large", 5000) as writer:
        writer.write(b"x" * 5000)
    assert file_store.get("large") == b"x" * 5000
    assert files_below(folder) == ["large"]


def test_file_store_below_a_regular_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = open_store((tmp_path / "file" / "store").as_uri())
    with pytest.raises(StoreError, match="cannot write to the store") as caught:
        check_writable(store)
    assert caught.value.exit_code == 17
    assert caught.value.advice
    with pytest.raises(StoreError), store.writer("key"):
        pytest.fail("the block of a writer that cannot write must not begin")


def test_file_store_key_that_is_a_folder_cannot_be_written(file_store: Store, folder: Path) -> None:
    file_store.put("a/b", b"1")
    with pytest.raises(StoreError):
        file_store.put("a", b"1")
    assert files_below(folder) == ["a/b"]


def test_file_store_folder_with_spaces_is_found(tmp_path: Path) -> None:
    store = open_store((tmp_path / "a folder, é").as_uri())
    store.put("key", b"1")
    assert files_below(tmp_path / "a folder, é") == ["key"]


def test_file_store_list_of_a_prefix_outside_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    store = FileStore((tmp_path / "store").as_uri())
    store.put("key", b"1")
    try:
        found = list(store.list("../"))
    except StoreError:
        found = []
    assert found == []


def test_file_store_url_with_a_host_is_refused() -> None:
    with pytest.raises(StoreError, match="names a host"):
        open_store("file://store/folder")


@pytest.mark.parametrize(("url", "words"), [("/just/a/folder", "has no scheme"), ("nosuchscheme://x", "cannot open the store")])
def test_open_store_of_a_wrong_url_says_what_to_write(url: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        open_store(url)
    assert caught.value.advice


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("az://container/x", "adlfs"), ("abfs://c@a/x", "adlfs")])
def test_open_store_whose_package_is_missing_names_it(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed, where it is
    with pytest.raises(StoreError, match=package) as caught:
        open_store(url)
    assert f"pip install {package}" in caught.value.advice


def test_file_store_disk_that_fills_up_is_an_error_and_leaves_nothing(file_store: Store, folder: Path) -> None:
    file_store.put("before", b"1")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for num_bytes in (None, 300_000):
            with pytest.raises(StoreError, match="cannot write") as caught, file_store.writer("a/large", num_bytes) as writer:
                writer.write(bytes(300_000))
            assert caught.value.advice
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_below(folder) == ["before"]


class _CountingFs(MemoryFileSystem):  # type: ignore[misc]
    """A file system of its own that counts how often it is asked about an object, and replaces it before the last time."""

    store: dict[str, Any] = {}
    replaced = False
    asked = 0

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self.asked += 1
        if self.replaced and self.asked > 1:
            self.pipe_file(path, bytes(self.store[path].getbuffer().nbytes))
        found: dict[str, Any] = super().info(path, **options)
        return found


@pytest.mark.parametrize("replaced", [False, True])
def test_fsspec_blocks_ask_about_the_object_before_the_first_and_after_the_last(replaced: bool) -> None:
    fs = _CountingFs(skip_instance_cache=True)
    store = FsspecStore(f"memory://{uuid.uuid4().hex}", fs=fs)
    data = bytes(range(256)) * (5 * BLOCK_BYTES // 256 // 2)
    store.put("key", data)
    fs.asked, fs.replaced = 0, replaced
    blocks = store.blocks("key")
    assert [next(blocks), next(blocks)] == [data[:BLOCK_BYTES], data[BLOCK_BYTES : 2 * BLOCK_BYTES]]
    if replaced:
        with pytest.raises(ObjectChangedError, match="replaced while it was read"):
            next(blocks)
    else:
        assert list(blocks) == [data[2 * BLOCK_BYTES :]]
    assert fs.asked == 2
