"""S3 stores against a real server: through s3fs alone, and with obstore for large objects."""

from __future__ import annotations

import uuid

import pytest

from orchestrator.core.spec import StoreOptions
from orchestrator.stores import Store, s3, s3_client
from orchestrator.stores.retrying import Backoff
from orchestrator.stores.s3 import S3Store
from orchestrator.stores.s3_client import S3Client
from tests.contracts.store_contract import NUM_RACERS, StoreContract
from tests.models.seaweed import Seaweed

PART_BYTES = 5 * 2**20
"""The least that S3 takes for a part that is not the last."""
AT_ONCE = Backoff(first_seconds=0.001, max_seconds=0.002, sleep=lambda _: None)


@pytest.fixture(scope="module")
def clients(seaweed: Seaweed) -> dict[str, S3Client]:
    """One connection for all the tests of a member: making one takes longer than most tests."""
    return {name: S3Client(seaweed.bucket, StoreOptions(transfer=name)) for name in ("s3fs", "obstore")}


@pytest.fixture
def url(s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corner of the bucket for each test; small parts, for a server on two cores."""
    monkeypatch.setattr(s3, "BLOCK_BYTES", PART_BYTES)
    return f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"


class TestS3StoreThroughS3fs(StoreContract):
    upload_bytes = PART_BYTES + 256

    @pytest.fixture
    def store(self, url: str, clients: dict[str, S3Client], monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setattr(s3_client, "_CONNECTIONS", self.num_races * NUM_RACERS)
        return S3Store(url, StoreOptions(transfer="s3fs"), client=clients["s3fs"], backoff=AT_ONCE)


class TestS3StoreWithObstore(StoreContract):
    upload_bytes = 2 * PART_BYTES + 256
    num_races = 2  # the code is that of the member above, and the server takes seconds for each

    @pytest.fixture
    def store(self, url: str, clients: dict[str, S3Client]) -> Store:
        return S3Store(url, StoreOptions(transfer="obstore"), client=clients["obstore"], backoff=AT_ONCE)
