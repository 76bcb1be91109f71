"""Builds through a proxy that hurts requests end right. Fifty of them: `python -m benchmarks.storage_faults`."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.support.fault_proxy import run_fault_proxy
from tests.support.s3_server import S3Server
from tests.support.storm import weather
from tests.support.tiny import write_tiny_llama


@pytest.mark.parametrize("seed", [1, 2], ids=["obstore", "s3fs"])
def test_build_in_a_storm_is_right_and_leaves_nothing(s3_environment: S3Server, tmp_path: Path, seed: int) -> None:
    source = write_tiny_llama(tmp_path / "model", vocab_size=40_000)  # its engine is larger than one part of an upload
    with run_fault_proxy(s3_environment) as proxy:
        found = weather(proxy, f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}", source, seed, rate=0.15)
    assert found.hurt
