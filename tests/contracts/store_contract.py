"""What every store must do. A subclass gives the fixture `store`: an open, empty store."""

from __future__ import annotations

import datetime
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable

import pytest

from orchestrator.base.errors import StoreError
from orchestrator.stores.store import ObjectExistsError, ObjectInfo, ObjectMissingError, Store, Writer, check_writable

NUM_RACERS = 16
BAD_KEYS = ("", "/absolute", "..", "../outside", "a/../../outside", "a/..")


def listed(store: Store, prefix: str = "") -> dict[str, int]:
    found = list(store.list(prefix))
    assert len({info.key for info in found}) == len(found)
    return {info.key: info.num_bytes for info in found}


def write_half_and_fail(store: Store, key: str, num_bytes: int | None = None, half: bytes = b"half") -> None:
    with store.writer(key, num_bytes) as writer:
        writer.write(half)
        raise ZeroDivisionError


class StoreContract:
    """Run by every member of stores/."""

    num_races = 20
    """Of put-if-absent, all at once, each between NUM_RACERS writers."""
    upload_bytes = 100_000
    """Enough to be more than a single request, where the store knows the difference."""
    shared_by_processes = True
    leaves_uploads = True
    """Whether a killed writer leaves what takes room."""

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 300])
    def test_put_object_is_read_back_whole(self, store: Store, data: bytes) -> None:
        store.put("folder/object.bin", data)
        assert store.get("folder/object.bin") == data
        assert store.size("folder/object.bin") == len(data)

    def test_put_again_replaces_the_object(self, store: Store) -> None:
        store.put("key", b"a longer first text")
        store.put("key", b"second")
        assert store.get("key") == b"second"
        assert listed(store) == {"key": 6}

    def test_put_create_existing_object_is_kept(self, store: Store) -> None:
        store.put("a/key", b"first", create=True)
        with pytest.raises(ObjectExistsError):
            store.put("a/key", b"second", create=True)
        assert store.get("a/key") == b"first"

    def test_put_create_after_delete_is_allowed(self, store: Store) -> None:
        store.put("key", b"first", create=True)
        store.delete("key")
        store.put("key", b"second", create=True)
        assert store.get("key") == b"second"

    def test_put_create_race_has_exactly_one_winner(self, store: Store) -> None:
        barrier = threading.Barrier(self.num_races * NUM_RACERS)
        winners: list[tuple[int, int]] = []
        errors: list[BaseException] = []

        def run(race: int, number: int) -> None:
            barrier.wait()
            try:
                store.put(f"outcomes/{race}.json", b"%d" % number, create=True)
                winners.append((race, number))
            except BaseException as error:
                errors.append(error)

        names = [(race, number) for race in range(self.num_races) for number in range(NUM_RACERS)]
        threads = [threading.Thread(target=run, args=name) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(race for race, _ in winners) == list(range(self.num_races))
        assert {type(error) for error in errors} == {ObjectExistsError}
        assert all(store.get(f"outcomes/{race}.json") == b"%d" % number for race, number in winners)
        assert len(listed(store)) == self.num_races

    @pytest.mark.parametrize("data", [b"", b"0123456789" * 1000])
    def test_blocks_joined_are_the_object(self, store: Store, data: bytes) -> None:
        store.put("object", data)
        assert b"".join(store.blocks("object")) == data

    def test_blocks_of_a_missing_object_raise_before_the_first(self, store: Store) -> None:
        with pytest.raises(ObjectMissingError, match="no/such"):
            next(iter(store.blocks("no/such")))

    def test_list_uploads_of_an_unended_writer_can_be_aborted(self, store: Store) -> None:
        """What a killed process leaves: a writer that never ends."""
        data = bytes(self.upload_bytes)
        writer = store.writer("folder/key", len(data) + 1)
        writer.__enter__()
        writer.write(data)
        if not self.leaves_uploads:
            assert list(store.list_uploads("")) == []
            assert listed(store) == {}
            return
        (upload,) = store.list_uploads("folder/")
        assert upload.key.startswith("folder/")
        age = datetime.datetime.now(datetime.UTC) - upload.started_at
        assert abs(age.total_seconds()) < 600
        assert list(store.list_uploads("other/")) == []
        store.abort_upload(upload)
        store.abort_upload(upload)
        assert list(store.list_uploads("")) == []
        with pytest.raises(StoreError):
            self._end(writer)
        assert listed(store) == {}
        assert list(store.list_uploads("")) == []

    def _end(self, writer: Writer) -> None:
        try:
            writer.write(b"1")
        except BaseException as error:
            writer.__exit__(type(error), error, None)
            raise
        writer.__exit__(None, None, None)

    def test_writer_that_ends_leaves_no_upload(self, store: Store) -> None:
        data = bytes(self.upload_bytes)
        with store.writer("good", len(data)) as writer:
            writer.write(data)
        with pytest.raises(ZeroDivisionError):
            write_half_and_fail(store, "bad", 2 * len(data), data)
        with pytest.raises(StoreError), store.writer("short", len(data) + 1) as writer:
            writer.write(data)
        assert list(store.list_uploads("")) == []
        assert listed(store) == {"good": len(data)}

    def test_writer_whose_caller_uses_its_buffer_again_keeps_the_bytes(self, store: Store) -> None:
        buffer = bytearray(self.upload_bytes // 4)
        with store.writer("key", 8 * len(buffer)) as writer:
            for number in range(8):
                buffer[:] = bytes([number]) * len(buffer)
                writer.write(buffer)
        assert store.get("key") == b"".join(bytes([number]) * len(buffer) for number in range(8))

    def test_store_and_its_pickle_hold_no_connection(self, store: Store) -> None:
        store.put("key", b"1")
        copy = pickle.loads(pickle.dumps(store))
        assert (copy.url, copy.get("key")) == (store.url, b"1")

    def test_store_used_before_a_fork_works_in_the_child(self, store: Store) -> None:
        if not self.shared_by_processes:
            pytest.skip("each process has a memory:// of its own")
        data = bytes(range(256)) * (self.upload_bytes // 256)
        with store.writer("parent", len(data)) as writer:
            writer.write(data)
        assert store.get_range("parent", 1, 5) == data[1:5]
        child = os.fork()
        if not child:
            os._exit(self._work_in_child(store, data))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert store.get_range("child", 2, 9) == data[2:9]

    def _work_in_child(self, store: Store, data: bytes) -> int:
        signal.alarm(60)  # a child that hangs must not hang the suite
        try:
            with store.writer("child", len(data)) as writer:
                writer.write(data)
            return 0 if b"".join(store.blocks("parent")) == data else 3
        except BaseException:
            traceback.print_exc()
            return 4

    @pytest.mark.parametrize(("begin", "end"), [(0, 10), (0, 1), (3, 7), (9, 10), (4, 4), (7, 99), (10, 20)])
    def test_get_range_is_the_slice(self, store: Store, begin: int, end: int) -> None:
        store.put("digits", b"0123456789")
        assert store.get_range("digits", begin, end) == b"0123456789"[begin:end]

    def test_missing_object_is_named_by_every_reader(self, store: Store) -> None:
        readers: list[Callable[[], object]] = [
            lambda: store.get("no/such"),
            lambda: store.get_range("no/such", 0, 1),
            lambda: store.copy("no/such", "target"),
        ]
        for read in readers:
            with pytest.raises(ObjectMissingError, match="no/such"):
                read()
        assert store.size("no/such") is None
        assert listed(store) == {}

    def test_folder_is_no_object(self, store: Store) -> None:
        store.put("folder/object", b"1")
        assert store.size("folder") is None
        with pytest.raises(ObjectMissingError):
            store.get("folder")

    def test_key_below_an_object_is_missing(self, store: Store) -> None:
        store.put("object", b"1")
        assert store.size("object/inner") is None
        with pytest.raises(ObjectMissingError):
            store.get("object/inner")

    def test_delete_object_is_gone(self, store: Store) -> None:
        store.put("a/b", b"1")
        store.put("a/c", b"2")
        store.delete("a/b")
        assert store.size("a/b") is None
        assert listed(store) == {"a/c": 1}

    @pytest.mark.parametrize("key", ["nothing", "no/such/folder", "object/inner"])
    def test_delete_of_nothing_is_no_error(self, store: Store, key: str) -> None:
        store.put("object", b"1")
        store.delete(key)
        assert store.get("object") == b"1"

    def test_list_finds_every_object_below_a_prefix(self, store: Store) -> None:
        for key in ("steps/ab/1/x", "steps/ab/2/y", "steps/abc/z", "outcomes/ab.json", "top"):
            store.put(key, key.encode())
        assert set(listed(store)) == {"steps/ab/1/x", "steps/ab/2/y", "steps/abc/z", "outcomes/ab.json", "top"}
        assert set(listed(store, "steps/ab/")) == {"steps/ab/1/x", "steps/ab/2/y"}
        assert set(listed(store, "steps/ab")) == {"steps/ab/1/x", "steps/ab/2/y", "steps/abc/z"}
        assert set(listed(store, "t")) == {"top"}
        assert listed(store, "nothing/") == {}
        assert ObjectInfo("top", 3) in set(store.list(""))

    def test_writer_appears_whole_at_the_end_of_its_block(self, store: Store) -> None:
        with store.writer("a/streamed") as writer:
            writer.write(b"first ")
            writer.write(bytearray(b"second "))
            writer.write(memoryview(b"third"))
        assert store.get("a/streamed") == b"first second third"
        assert listed(store) == {"a/streamed": 18}

    def test_writer_is_not_seen_before_its_end(self, store: Store) -> None:
        with store.writer("streamed", 4) as writer:
            writer.write(b"ab")
            assert store.size("streamed") is None
            assert listed(store) == {}
            writer.write(b"cd")
        assert store.get("streamed") == b"abcd"

    def test_writer_without_bytes_makes_an_empty_object(self, store: Store) -> None:
        with store.writer("empty", 0):
            pass
        assert store.get("empty") == b""

    def test_writer_replaces_an_object(self, store: Store) -> None:
        store.put("key", b"a longer first text")
        with store.writer("key", 3) as writer:
            writer.write(b"new")
        assert store.get("key") == b"new"

    @pytest.mark.parametrize("num_bytes", [None, 4, 9])
    def test_writer_that_raises_publishes_nothing(self, store: Store, num_bytes: int | None) -> None:
        with pytest.raises(ZeroDivisionError):
            write_half_and_fail(store, "a/key", num_bytes)
        assert store.size("a/key") is None
        assert listed(store) == {}

    def test_writer_that_raises_keeps_the_object_that_was_there(self, store: Store) -> None:
        store.put("key", b"before")
        with pytest.raises(ZeroDivisionError):
            write_half_and_fail(store, "key")
        assert store.get("key") == b"before"

    @pytest.mark.parametrize("data", [b"", b"short", b"much too long"])
    def test_writer_of_another_length_than_announced_is_refused(self, store: Store, data: bytes) -> None:
        with pytest.raises(StoreError, match=f"{len(data)} bytes were written, 10 announced"), store.writer("key", 10) as writer:
            writer.write(data)
        assert store.size("key") is None
        assert listed(store) == {}

    def test_writers_side_by_side_do_not_mix(self, store: Store) -> None:
        with store.writer("one", 4) as one, store.writer("two", 4) as two:
            for byte in b"1234":
                one.write(bytes([byte]))
                two.write(bytes([byte + 16]))
        assert (store.get("one"), store.get("two")) == (b"1234", b"ABCD")

    def test_copy_is_an_object_of_its_own(self, store: Store) -> None:
        store.put("source", b"text")
        store.copy("source", "releases/a/target")
        assert listed(store) == {"source": 4, "releases/a/target": 4}
        store.delete("source")
        assert store.get("releases/a/target") == b"text"

    def test_copy_is_not_changed_when_its_source_is_replaced(self, store: Store) -> None:
        store.put("source", b"text")
        store.copy("source", "target")
        store.put("source", b"another text")
        assert store.get("target") == b"text"

    def test_copy_replaces_its_target(self, store: Store) -> None:
        store.put("source", b"new")
        store.put("target", b"an older object")
        store.copy("source", "target")
        store.copy("source", "target")
        assert listed(store) == {"source": 3, "target": 3}
        assert store.get("target") == b"new"

    def test_copy_onto_itself_keeps_it(self, store: Store) -> None:
        store.put("key", b"text")
        store.copy("key", "key")
        assert listed(store) == {"key": 4}
        assert store.get("key") == b"text"

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_key_that_leaves_the_store_is_refused_by_every_method(self, store: Store, key: str) -> None:
        store.put("good", b"1")
        methods: list[Callable[[], object]] = [
            lambda: store.get(key),
            lambda: store.get_range(key, 0, 1),
            lambda: store.size(key),
            lambda: store.put(key, b"1"),
            lambda: store.put(key, b"1", create=True),
            lambda: store.writer(key).__enter__(),
            lambda: store.copy("good", key),
            lambda: store.copy(key, "other"),
            lambda: store.delete(key),
        ]
        for method in methods:
            with pytest.raises(StoreError, match="is not a key"):
                method()
        assert listed(store) == {"good": 1}

    @pytest.mark.parametrize("word", ["a b", "100%", "%20", "é", "a+b", "a#b", ".hidden", "a..b", "...", "-", "=&?"])
    def test_key_of_unusual_characters_is_kept_as_it_is(self, store: Store, word: str) -> None:
        key = f"keys/{word}/{word}"
        store.put(key, b"0")
        with store.writer(key, 1) as writer:
            writer.write(b"1")
        assert store.get(key) == store.get_range(key, 0, 1) == b"1"
        assert listed(store, "keys/") == {key: 1}
        store.delete(key)
        assert listed(store, "keys/") == {}

    def test_check_writable_leaves_nothing(self, store: Store) -> None:
        check_writable(store)
        assert listed(store) == {}

    def test_local_path_where_there_is_one_holds_the_object(self, store: Store) -> None:
        store.put("a/key", b"text")
        path = store.local_path("a/key")
        assert path is None or path.read_bytes() == b"text"
