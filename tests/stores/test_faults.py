"""S3 stores when the network and the server fail: nothing lost, nothing torn, nothing published twice."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from orchestrator.base.errors import DigestError, StoreError
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import s3
from orchestrator.stores.obstore import BotocoreCredentials, ObstoreStore
from orchestrator.stores.retrying import Backoff
from orchestrator.stores.s3 import S3Store
from orchestrator.stores.store import ObjectChangedError, ObjectExistsError, ObjectMissingError, check_writable
from orchestrator.work.context import download
from tests.contracts.store_contract import listed, write_half_and_fail
from tests.support.fault_proxy import Fault, FaultProxy, run_fault_proxy
from tests.support.s3_server import KEY, SECRET, S3Server

PART_BYTES = 5 * 2**20
READ_TIMEOUT_SECONDS = 1.5
DATA = random.Random(5).randbytes(2 * PART_BYTES + 12345)
HURTS = (Fault.BUSY, Fault.RESET, Fault.LOST_ANSWER, Fault.TRUNCATED)

Transfer = Literal["s3fs", "obstore"]
both = pytest.mark.parametrize("transfer", ["s3fs", "obstore"])


class Workbench:
    """Stores behind a proxy, and what they slept."""

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        self.server, self.proxy = server, proxy
        self.url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
        self.slept: list[float] = []

    def store(self, transfer: Transfer = "s3fs", max_attempts: int = 12) -> S3Store:
        options = StoreOptions(
            endpoint_url=self.proxy.url, transfer=transfer, read_timeout_seconds=READ_TIMEOUT_SECONDS, max_attempts=max_attempts
        )
        backoff = Backoff(max_attempts, first_seconds=0.001, max_seconds=0.002, sleep=self.slept.append, draw=lambda: 1.0)
        return (ObstoreStore if transfer == "obstore" else S3Store)(self.url, options, backoff=backoff)

    def truth(self) -> S3Store:
        """The same store, past the proxy."""
        return S3Store(self.url, StoreOptions(endpoint_url=self.server.endpoint, transfer="s3fs"))


@pytest.fixture(scope="module")
def proxy_of_module(s3_server: S3Server) -> Iterator[FaultProxy]:
    with run_fault_proxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def bench(s3_environment: S3Server, proxy_of_module: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setattr(s3, "BLOCK_BYTES", PART_BYTES)
    proxy = proxy_of_module
    proxy.rate = 0.0
    for what in (proxy.script, proxy.always, proxy.seen):
        what.clear()  # type: ignore[attr-defined]
    return Workbench(s3_environment, proxy)


def write(store: S3Store, key: str, data: bytes = DATA) -> None:
    with store.writer(key, len(data)) as writer:
        for begin in range(0, len(data), 1_000_000):
            writer.write(data[begin : begin + 1_000_000])


@both
@pytest.mark.parametrize("seed", [1, 2])
def test_storm_everything_ends_as_without_it(bench: Workbench, transfer: Transfer, seed: int) -> None:
    store = bench.store(transfer, max_attempts=25)
    bench.proxy.storm(seed, 0.25, HURTS)
    for number in range(6):
        store.put(f"small/{number}", b"%d" % number, create=True)
    write(store, "large")
    store.copy("large", "copy")
    assert hashlib.sha256(b"".join(store.blocks("large"))).digest() == hashlib.sha256(DATA).digest()
    assert store.get_range("large", PART_BYTES - 5, PART_BYTES + 5) == DATA[PART_BYTES - 5 : PART_BYTES + 5]
    store.delete("small/0")
    for number in range(1, 6):
        with pytest.raises(ObjectExistsError):
            store.put(f"small/{number}", b"another", create=True)
    for upload in list(store.list_uploads("")):  # begun by requests whose answers were lost
        store.abort_upload(upload)
    bench.proxy.rate = 0.0
    truth = bench.truth()
    assert listed(truth) == {**{f"small/{number}": 1 for number in range(1, 6)}, "large": len(DATA), "copy": len(DATA)}
    assert truth.get("large") == truth.get("copy") == DATA
    assert list(truth.list_uploads("")) == []


@pytest.mark.parametrize("fault", [Fault.LOST_ANSWER, Fault.STALL, Fault.TRUNCATED])
def test_put_create_whose_answer_is_lost_is_known_for_our_own(bench: Workbench, fault: Fault) -> None:
    """aiohttp sends a PUT again by itself when a connection breaks: that one is told that the object exists."""
    bench.proxy.script.append(("PUT", fault))
    bench.store().put("key", b"ours", create=True)
    assert bench.truth().get("key") == b"ours"
    with pytest.raises(ObjectExistsError):
        bench.store().put("key", b"ours", create=True)


def test_put_create_that_never_arrived_loses_to_another_writer(bench: Workbench) -> None:
    store = bench.store()
    bench.proxy.script += [("PUT", Fault.RESET)]
    bench.truth().put("key", b"theirs", create=True)
    with pytest.raises(ObjectExistsError):
        store.put("key", b"theirs", create=True)  # the same bytes, and yet another writer's


def test_put_create_conflict_is_tried_again_and_won(bench: Workbench) -> None:
    bench.proxy.script += [("PUT", Fault.CONFLICT)] * 3
    bench.store().put("key", b"1", create=True)
    assert bench.proxy.count("PUT") == 4


def test_put_busy_server_waits_longer_each_time(bench: Workbench) -> None:
    bench.proxy.script += [("PUT", Fault.BUSY)] * 4
    store = bench.store()
    store._backoff = Backoff(sleep=bench.slept.append, draw=lambda: 1.0)
    store.put("key", b"1")
    assert bench.slept == [0.5, 1.0, 2.0, 4.0]


@both
def test_put_outage_that_lasts_is_given_up_with_advice(bench: Workbench, transfer: Transfer) -> None:
    bench.proxy.always["PUT"] = Fault.BUSY
    with pytest.raises(StoreError, match=r"tried 3 times.*SlowDown") as caught:
        bench.store(transfer, max_attempts=3).put("key", b"1")
    assert caught.value.advice
    assert len(bench.slept) == 2


@both
def test_writer_whose_completion_answer_is_lost_is_not_an_error(bench: Workbench, transfer: Transfer) -> None:
    store = bench.store(transfer)
    with store.writer("key", len(DATA)) as writer:
        writer.write(DATA)
        while not bench.proxy.count("PUT", "uploadId"):
            writer.write(b"")  # until the upload has begun, so that the next POST is its end
        bench.proxy.script.append(("POST", Fault.LOST_ANSWER))
    assert bench.truth().get("key") == DATA
    assert list(bench.truth().list_uploads("")) == []


def test_writer_damaged_part_is_refused_by_the_server_and_sent_again(bench: Workbench) -> None:
    bench.proxy.script += [("PUT", Fault.DAMAGED_REQUEST)] * 2
    write(bench.store("s3fs"), "key")
    assert bench.truth().get("key") == DATA


@pytest.mark.skipif(os.environ.get("S3_SERVER") == "ceph", reason="Ceph 16 verifies none of the checksums that obstore can send")
def test_writer_damaged_part_that_obstore_does_not_send_again_publishes_nothing(bench: Workbench) -> None:
    bench.proxy.script += [("PUT", Fault.DAMAGED_REQUEST)]
    with pytest.raises(StoreError):
        write(bench.store("obstore"), "key")
    assert listed(bench.truth()) == {}
    assert list(bench.truth().list_uploads("")) == []


@both
def test_writer_outage_in_the_middle_publishes_nothing_and_leaves_nothing(bench: Workbench, transfer: Transfer) -> None:
    bench.proxy.always["PUT"] = Fault.BUSY
    with pytest.raises(StoreError):
        write(bench.store(transfer, max_attempts=3), "key")
    truth = bench.truth()
    assert truth.size("key") is None
    assert list(truth.list_uploads("")) == []


@both
def test_writer_block_that_raises_in_a_storm_leaves_nothing(bench: Workbench, transfer: Transfer) -> None:
    store = bench.store(transfer)
    bench.proxy.script += [("PUT", Fault.BUSY), ("DELETE", Fault.BUSY)]
    with pytest.raises(ZeroDivisionError):
        write_half_and_fail(store, "key", len(DATA), DATA)
    assert listed(bench.truth()) == {}
    assert list(bench.truth().list_uploads("")) == []


@both
@pytest.mark.parametrize("fault", [Fault.TRUNCATED, Fault.STALL, Fault.LOST_ANSWER, Fault.BUSY])
def test_read_hurt_answer_is_asked_for_again(bench: Workbench, transfer: Transfer, fault: Fault) -> None:
    bench.truth().put("key", DATA)
    store = bench.store(transfer)
    bench.proxy.script += [("GET", fault)]
    assert store.get_range("key", 10, 3_000_000) == DATA[10:3_000_000]
    assert bench.proxy.count("GET") == 2


@both
def test_read_missing_object_is_asked_for_once(bench: Workbench, transfer: Transfer) -> None:
    with pytest.raises(ObjectMissingError):
        bench.store(transfer).get_range("key", 0, 5)
    assert bench.proxy.count("GET") == 1


@both
def test_blocks_of_an_object_replaced_between_two_are_an_error(bench: Workbench, transfer: Transfer) -> None:
    truth = bench.truth()
    truth.put("key", DATA)
    blocks = bench.store(transfer).blocks("key")
    assert next(blocks) == DATA[:PART_BYTES]
    truth.put("key", DATA[::-1])
    with pytest.raises(ObjectChangedError, match="replaced while it was read"):
        list(blocks)


@both
def test_download_damaged_once_is_read_again(bench: Workbench, transfer: Transfer, tmp_path: Path) -> None:
    bench.truth().put("key", DATA)
    bench.proxy.script += [("GET", Fault.DAMAGED_ANSWER)]
    download(bench.store(transfer), "key", len(DATA), hashlib.sha256(DATA).hexdigest(), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_download_of_wrong_bytes_leaves_no_file(bench: Workbench, tmp_path: Path) -> None:
    bench.truth().put("key", DATA)
    bench.proxy.always["GET"] = Fault.DAMAGED_ANSWER
    with pytest.raises(DigestError):
        download(bench.store(), "key", len(DATA), hashlib.sha256(DATA).hexdigest(), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@both
def test_expired_credentials_are_found_anew_once(bench: Workbench, transfer: Transfer) -> None:
    bench.truth().put("key", DATA)
    store = bench.store(transfer)
    assert store.get_range("key", 0, 5) == DATA[:5]
    before = store.fs
    bench.proxy.script += [("GET", Fault.EXPIRED)]
    assert store.get_range("key", 0, 5) == DATA[:5]
    assert store.fs is not before
    bench.proxy.always["GET"] = Fault.EXPIRED
    bench.proxy.seen.clear()
    with pytest.raises(StoreError, match="credentials were refused") as caught:
        store.get_range("key", 0, 5)
    assert "role" in caught.value.advice
    assert bench.proxy.count("GET") == 2
    assert bench.slept == []


_GIVE_CREDENTIALS = """
import datetime, json, pathlib, sys
calls = pathlib.Path(sys.argv[1])
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
print(json.dumps({"Version": 1, "AccessKeyId": sys.argv[2], "SecretAccessKey": sys.argv[3], "Expiration": until.isoformat()}))
"""


@pytest.fixture
def credential_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_environment: S3Server) -> Path:
    """Credentials of a minute from a program, as short-lived ones of a role come; a letter in the file for each that it gave."""
    script, calls, config = tmp_path / "give.py", tmp_path / "calls", tmp_path / "config"
    script.write_text(_GIVE_CREDENTIALS)
    config.write_text(f"[profile build]\ncredential_process = {sys.executable} {script} {calls} {KEY} {SECRET}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "build")
    return calls


@both
def test_short_lived_credentials_are_renewed_before_they_expire_and_when_refused(
    bench: Workbench, credential_calls: Path, transfer: Transfer
) -> None:
    store = bench.store(transfer)
    write(store, "key")  # botocore asks again whenever less than ten minutes are left
    before = len(credential_calls.read_text())
    assert before > 1
    bench.proxy.script += [("GET", Fault.EXPIRED)]
    assert store.get_range("key", 0, 5) == DATA[:5]
    assert len(credential_calls.read_text()) > before
    provider = BotocoreCredentials(None)
    before = len(credential_calls.read_text())
    assert provider()["access_key_id"] == provider()["access_key_id"] == KEY
    assert len(credential_calls.read_text()) > before


@pytest.mark.parametrize("fault", [Fault.UNCONDITIONAL, Fault.NOT_IMPLEMENTED])
def test_check_writable_server_without_put_if_absent_is_refused(bench: Workbench, fault: Fault) -> None:
    bench.proxy.always["PUT"] = fault
    with pytest.raises(StoreError, match=r"put-if-absent|does not implement") as caught:
        check_writable(bench.store())
    assert "server that has conditional" in caught.value.advice
    assert listed(bench.truth()) == {}


@both
def test_check_writable_server_without_multipart_uploads_says_so(bench: Workbench, transfer: Transfer) -> None:
    bench.proxy.always["POST"] = Fault.NOT_IMPLEMENTED
    with pytest.raises(StoreError, match="multipart uploads fail") as caught:
        check_writable(bench.store(transfer))
    assert "checksums: when_required" in caught.value.advice
    assert listed(bench.truth()) == {}


def test_copy_of_a_large_object_is_made_in_parts(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "COPY_BYTES", PART_BYTES)
    monkeypatch.setattr(s3, "COPY_PART_BYTES", PART_BYTES)
    bench.truth().put("source", DATA)
    bench.proxy.script += [("PUT", Fault.BUSY), ("POST", Fault.BUSY)]
    bench.store().copy("source", "target")
    assert bench.proxy.count("PUT", "partNumber") == 4
    assert bench.truth().get("target") == DATA


def test_download_to_a_place_that_takes_no_more_is_a_store_error_and_leaves_nothing(bench: Workbench, tmp_path: Path) -> None:
    bench.truth().put("key", DATA)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PART_BYTES + 1000, before[1]))
    try:
        with pytest.raises(StoreError, match="cannot write") as caught:
            download(bench.store(), "key", len(DATA), hashlib.sha256(DATA).hexdigest(), tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "takes no files of this size" in caught.value.advice
    assert list(tmp_path.iterdir()) == []


_WRITE_AND_WAIT = """
import sys
from orchestrator.spec.cluster import StoreOptions
from orchestrator.stores import open_store, s3
s3.BLOCK_BYTES = 5 * 2**20
store = open_store(sys.argv[1], StoreOptions(transfer=sys.argv[2]))
with store.writer("steps/killed", 3 * s3.BLOCK_BYTES) as writer:
    writer.write(bytes(2 * s3.BLOCK_BYTES))
    print("written", flush=True)
    sys.stdin.read()
"""


@both
def test_writer_killed_in_the_middle_leaves_an_upload_that_can_be_found_and_aborted(bench: Workbench, transfer: Transfer) -> None:
    truth = bench.truth()
    words = [sys.executable, "-c", _WRITE_AND_WAIT, bench.url, transfer]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert listed(truth) == {}
    (upload,) = truth.list_uploads("steps/")
    assert upload.key == "steps/killed"
    truth.abort_upload(upload)
    assert list(truth.list_uploads("")) == []
