"""A source in a real object store: a server on loopback. Credentials come from the environment only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import sync
from typer.testing import CliRunner

from orchestrator.base.errors import SourceCorruptError, StoreError
from orchestrator.cli.commands import app
from orchestrator.clusters.local import LocalCluster
from orchestrator.events import silent
from orchestrator.planning import preparation
from orchestrator.planning.plan import Plan
from orchestrator.planning.steps import Kind, Outcome
from orchestrator.scheduling import execute
from orchestrator.spec.cluster import ClusterSpec
from orchestrator.stores import open_source
from orchestrator.stores.remote import RemoteFolder
from orchestrator.stores.retrying import Backoff
from orchestrator.stores.s3 import S3Source
from tests.conftest import SpecMaker
from tests.integration.steps import run_steps
from tests.support.s3_server import BUCKET, SECRET, S3Server


@pytest.fixture
def s3(s3_environment: S3Server) -> Any:
    """A client; the environment names the server and the credentials for everyone. Ceph over https refuses botocore's trailers."""
    config = {"request_checksum_calculation": "when_required"}
    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)


def upload(fs: Any, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        fs.pipe_file(f"{BUCKET}/{prefix}/{path.name}", path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


def convert_with_processes(plan: Plan, store: str) -> list[Outcome]:
    """The convert steps as a build runs them: each in a process of its own."""
    only = Plan(plan.spec, plan.inputs, tuple(plan.of_kind(Kind.CONVERT)))
    result = execute.execute(only, {}, ClusterSpec(store=store), LocalCluster, silent)
    result.raise_failures(only)
    return [result.outcomes[step.digest] for step in only.steps]


def test_convert_from_s3_reads_each_byte_once_and_gives_the_local_bytes(
    s3: Any, sharded_llama: Path, make_spec: SpecMaker, tmp_path: Path
) -> None:
    url = upload(s3, sharded_llama, "llama")
    sections = {"topology": {"tp": 2}, "conversion": {"max_shard_bytes": "120KB"}}
    local = preparation.plan(make_spec(sharded_llama, **sections))
    remote = preparation.plan(make_spec(url, **sections))
    assert len(list(remote.of_kind(Kind.CONVERT))) > 1
    wanted = run_steps(local, (tmp_path / "local").as_uri(), (Kind.CONVERT,))
    found = convert_with_processes(remote, (tmp_path / "remote").as_uri())
    for outcome in found:
        assert [(output.name, output.sha256) for output in outcome.outputs] == [
            (output.name, output.sha256) for output in wanted[outcome.name].outputs
        ]
    assert sum(outcome.facts.source_bytes_read for outcome in found) == remote.inputs.index.num_bytes
    said = remote.inputs.source + "".join(step.model_dump_json() for step in remote.steps)
    assert SECRET not in said


def test_build_steps_from_s3_verify_against_a_reference_read_from_there(
    s3: Any, tiny_llama: Path, make_spec: SpecMaker, tmp_path: Path
) -> None:
    url = upload(s3, tiny_llama, "reference")
    outcomes = run_steps(preparation.plan(make_spec(url)), (tmp_path / "store").as_uri(), (Kind.REFERENCE,))
    local = run_steps(preparation.plan(make_spec(tiny_llama)), (tmp_path / "local").as_uri(), (Kind.REFERENCE,))
    assert outcomes["reference"].outputs[0].sha256 == local["reference"].outputs[0].sha256


def test_read_into_large_ranges_of_s3(s3: Any) -> None:
    data = bytes(range(256)) * (80 * 1024)
    s3.pipe_file(f"{BUCKET}/large/x", data)
    place = open_source(f"s3://{BUCKET}/large")
    assert place.names() == ["x"]
    assert place.read("x", 100, 300) == data[100:300]
    buffer = bytearray(len(data) - 7)
    with place.open((place.source_file("x"),)) as source:
        source.read_into(0, 7, memoryview(buffer))
        assert source.bytes_read == len(buffer)
    assert bytes(buffer) == data[7:]


def test_read_into_of_an_object_replaced_between_two_reads_is_refused(s3: Any) -> None:
    s3.pipe_file(f"{BUCKET}/replaced/x", b"0123456789")
    place = open_source(f"s3://{BUCKET}/replaced")
    buffer = memoryview(bytearray(4))
    with place.open((place.source_file("x"),)) as source:
        source.read_into(0, 0, buffer)
        s3.pipe_file(f"{BUCKET}/replaced/x", b"9876543210")
        with pytest.raises(SourceCorruptError, match="was replaced while it was read"):
            source.read_into(0, 4, buffer)


@pytest.mark.skipif(
    os.environ.get("S3_SERVER") == "ceph", reason="Ceph 16 refuses the trailer that carries the checksum, and keeps none"
)
def test_identity_of_an_object_with_a_sha256_is_its_content_and_a_version_is_still_told_from_another(s3: Any) -> None:
    def put(data: bytes) -> None:
        sync(s3.loop, s3._call_s3, "put_object", Bucket=BUCKET, Key="checked/x", Body=data, ChecksumAlgorithm="SHA256")

    put(b"0123456789")
    place = open_source(f"s3://{BUCKET}/checked")
    planned = place.source_file("x")
    assert planned.identity == "sha256:" + hashlib.sha256(b"0123456789").hexdigest()
    put(b"0123456789")  # uploaded again
    assert place.source_file("x") == planned
    buffer = memoryview(bytearray(4))
    with place.open((planned,)) as source:
        source.read_into(0, 0, buffer)
        put(b"9876543210")
        with pytest.raises(SourceCorruptError, match="was replaced while it was read"):
            source.read_into(0, 4, buffer)


def test_read_with_wrong_credentials_fails_at_once(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    slept: list[float] = []
    with pytest.raises(StoreError, match="credentials were refused"):
        RemoteFolder(S3Source(f"s3://{BUCKET}/llama", backoff=Backoff(sleep=slept.append))).read("config.json")
    assert slept == []


def test_command_line_converts_and_compares_a_url(s3: Any, tiny_llama: Path, tmp_path: Path) -> None:
    url = upload(s3, tiny_llama, "command")
    for name, source in (("local", str(tiny_llama)), ("remote", url)):
        result = CliRunner().invoke(app, ["convert", "--source", source, "--output", str(tmp_path / name), "--tp", "2"])
        assert result.exit_code == 0, result.output
    for path in (tmp_path / "local").iterdir():
        assert (tmp_path / "remote" / path.name).read_bytes() == path.read_bytes()
    result = CliRunner().invoke(app, ["checkpoint", "compare", str(tiny_llama), url])
    assert result.exit_code == 0, result.output
    assert "identical" in result.output
