"""Two builds that publish the same release at once, in processes of their own. More: `python -m benchmarks.storage_race`."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.support.race import Racers, check_store, race
from tests.support.releases import make_keys
from tests.support.s3_server import S3Server


@pytest.mark.parametrize(("scheme", "is_same", "rounds"), [("s3", False, 6), ("file", False, 20), ("file", True, 20)])
def test_build_two_processes_at_once_publish_one_manifest_and_harm_nothing(
    s3_environment: S3Server, tiny_llama: Path, tmp_path: Path, scheme: str, is_same: bool, rounds: int
) -> None:
    store = f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}" if scheme == "s3" else (tmp_path / "store").as_uri()
    private, public = make_keys(tmp_path / "keys")
    codes = list(race(Racers(tiny_llama, store, private, is_same, rebuilds=False), rounds))
    assert len(codes) == rounds
    check_store(store, public, rounds)
