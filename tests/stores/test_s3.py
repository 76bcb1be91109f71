"""S3 stores against a real server: through s3fs alone, and with obstore for large objects."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.base.errors import SpecError, StoreError
from orchestrator.clusters.local import LocalCluster
from orchestrator.events import silent
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Task
from orchestrator.scheduling import execute
from orchestrator.scheduling.cluster import worker_environment
from orchestrator.spec.cluster import ClusterSpec, StoreOptions
from orchestrator.spec.decoding import decode
from orchestrator.stores import obstore, open_store, s3
from orchestrator.stores.obstore import ObstoreStore
from orchestrator.stores.retrying import Backoff, RefusedCredentialsError, TransientError, refusal
from orchestrator.stores.s3 import S3Store, part_bytes
from orchestrator.stores.store import (
    BLOCK_BYTES,
    NoSuchUploadError,
    ObjectExistsError,
    ObjectMissingError,
    Store,
    check_writable,
)
from tests.conftest import SpecMaker
from tests.contracts.store_contract import NUM_RACERS, StoreContract
from tests.support.s3_server import SECRET, S3Server, in_environment

PART_BYTES = 5 * 2**20
"""The least that S3 takes for a part that is not the last."""
AT_ONCE = Backoff(first_seconds=0.001, max_seconds=0.002, sleep=lambda _: None)


@pytest.fixture(scope="module")
def connection(s3_server: S3Server) -> Iterator[Any]:
    """One for all the tests of this module: making one takes longer than most of them."""
    with in_environment(s3_server), pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "CONNECTIONS", StoreContract.num_races * NUM_RACERS)
        yield S3Store(f"s3://{s3_server.bucket}", StoreOptions()).fs


@pytest.fixture
def url(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corner of the bucket for each test; small parts, for a server on two cores."""
    monkeypatch.setattr(s3, "BLOCK_BYTES", PART_BYTES)
    return f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"


class TestS3StoreThroughS3fs(StoreContract):
    upload_bytes = PART_BYTES + 256

    @pytest.fixture
    def store(self, url: str, connection: Any) -> Store:
        return S3Store(url, StoreOptions(transfer="s3fs"), fs=connection, backoff=AT_ONCE)


class TestS3StoreWithObstore(StoreContract):
    upload_bytes = 2 * PART_BYTES + 256
    num_races = 20 if "S3_SERVER" in os.environ else 2  # the code is that of the member above, and takes seconds

    @pytest.fixture
    def store(self, url: str, connection: Any) -> Store:
        return ObstoreStore(url, StoreOptions(transfer="obstore"), fs=connection, backoff=AT_ONCE)


@given(st.integers(0, 50 * 2**40))
def test_part_bytes_of_any_size_makes_no_more_than_ten_thousand_parts(num_bytes: int) -> None:
    size = part_bytes(num_bytes)
    assert -(-num_bytes // size) <= 10_000
    assert 5 * 2**20 <= BLOCK_BYTES <= size <= max(BLOCK_BYTES, num_bytes // 9_000 + 2 * 2**20)


def test_no_secret_in_what_leaves_the_process(
    url: str, tiny_llama: Path, make_spec: SpecMaker, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A conversion into the store; then everything that it has written, said, pickled or sends to a worker is searched."""
    caplog.set_level("DEBUG")
    plan = preparation.plan(make_spec(tiny_llama))
    only = Plan(plan.spec, plan.inputs, tuple(plan.of_kind(Kind.CONVERT)))
    place = ClusterSpec(store=url, store_options=StoreOptions(region="us-east-1"))
    store = open_store(url, place.store_options)
    check_writable(store)
    result = execute.execute(only, {}, place, LocalCluster, silent)
    result.raise_failures(only)
    with pytest.raises(StoreError) as caught:
        store.get("no/such")
    (step,) = only.steps
    task = Task(step=step, inputs={}, attempt=1, store=url, store_options=place.store_options)
    said = [pickle.dumps(store), pickle.dumps(task), *(store.get(info.key) for info in store.list(""))]
    sent = [task.model_dump_json(), place.model_dump_json(), repr(worker_environment(1, gpu=False))]
    shown = [repr(store), str(caught.value), str(vars(caught.value)), *capfd.readouterr()]
    logged = [record.getMessage() for record in caplog.records if record.name.startswith(("orchestrator", "actors"))]
    assert len(list(store.list("outcomes/"))) == 1
    said += [text.encode() for text in (*sent, *shown, *logged)]
    assert [text for text in said if SECRET.encode() in text] == []


@pytest.mark.parametrize(
    "bad", ["s3://key:hunter2@bucket/p", "s3://hunter2@bucket/p", "s3://bucket/p?X-Amz-Signature=hunter2", "gs://u:hunter2@bucket"]
)
def test_url_with_a_secret_is_refused_without_repeating_it(bad: str) -> None:
    with pytest.raises(StoreError, match="user, password or query") as refused:
        open_store(bad)
    with pytest.raises(SpecError, match="credentials belong") as undecoded:
        decode(ClusterSpec, {"store": bad}, "cluster.yaml")
    assert "hunter2" not in f"{refused.value} {refused.value.advice} {undecoded.value}"


@pytest.mark.parametrize("options", [{"endpoint_url": "http://u:p@host"}, {"endpoint_url": "host:80"}, {"secret_access_key": "s"}])
def test_store_options_with_a_secret_or_no_url_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(SpecError, match="store_options"):
        decode(ClusterSpec, {"store": "s3://bucket", "store_options": options}, "cluster.yaml")


def test_wrong_secret_is_refused_at_once_with_advice(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    slept: list[float] = []
    with pytest.raises(StoreError, match="SignatureDoesNotMatch") as caught:
        S3Store(url, StoreOptions(), backoff=Backoff(sleep=slept.append)).put("key", b"1")
    assert "secret key is wrong" in caught.value.advice
    assert slept == []


def test_no_credentials_at_all_is_said(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StoreError, match="NoCredentials") as caught:
        open_store(f"s3://{s3_environment.bucket}").put("key", b"1")
    assert "web identity or role" in caught.value.advice


@pytest.mark.parametrize(
    ("status", "code", "meaning"),
    [
        (409, "ConditionalRequestConflict", TransientError),
        (412, "PreconditionFailed", ObjectExistsError),
        (503, "SlowDown", TransientError),
        (500, "InternalError", TransientError),
        (429, "TooManyRequests", TransientError),
        (400, "RequestTimeout", TransientError),
        (400, "BadDigest", TransientError),
        (400, "ExpiredToken", RefusedCredentialsError),
        (403, "403", RefusedCredentialsError),
        (403, "AccessDenied", StoreError),
        (404, "NoSuchKey", ObjectMissingError),
        (404, "NoSuchUpload", NoSuchUploadError),
        (404, "NoSuchBucket", StoreError),
        (501, "NotImplemented", StoreError),
    ],
)
def test_refusal_of_the_server_has_its_meaning(status: int, code: str, meaning: type[Exception]) -> None:
    assert type(refusal(status, code, "words")) is meaning
    obstores = f"Generic S3 error: Server returned non-2xx status code: {status} X: <Error><Code>{code}</Code></Error>"
    assert type(obstore.meaning(obstores)) is meaning
